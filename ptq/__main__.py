"""``python -m ptq`` is the ``ptq`` command."""

import sys

from ptq.cli import main

sys.exit(main())
