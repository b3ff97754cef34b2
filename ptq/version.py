"""The version, for a checkout that is run without being installed too."""

VERSION = "0.1.0"
