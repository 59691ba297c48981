"""The command `kvrun`, and python -m kvrun."""

import sys

try:
    from kvrun.cli import main
except KeyboardInterrupt:  # an impatient Ctrl+C needs no traceback
    sys.exit(130)

if __name__ == "__main__":
    main()
