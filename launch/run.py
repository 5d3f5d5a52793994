"""The one script that launchers start: its own folder, not the repository root, comes first on the import path."""

import sys

from minitron.cli import main

if __name__ == "__main__":
    sys.exit(main())
