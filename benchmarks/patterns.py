"""What a regular expression on a command line is read with."""

import argparse
import re


def pattern(text: str) -> str:
    """The text itself. Raises argparse.ArgumentTypeError where it is no regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, {text!r} is none: {error}") from error
    return text
