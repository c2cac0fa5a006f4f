"""`python -m cloister`."""

import sys

from cloister.cli import main

sys.exit(main())
