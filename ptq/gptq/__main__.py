"""``python -m ptq.gptq --config run.yaml``."""

import sys

from ptq.cli import main_of_method

sys.exit(main_of_method("gptq"))
