"""`python -m allocator`: the daemon alone, as the server starts it where none runs."""

import sys

from allocator.daemon import main

if __name__ == "__main__":
    sys.exit(main())
