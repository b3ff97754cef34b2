"""``python -m ptq.awq --config run.yaml``."""

import sys

from ptq.cli import main_of_method

sys.exit(main_of_method("awq"))
