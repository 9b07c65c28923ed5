"""Run the command line: `python -m transpixeler`."""

from transpixeler.cli import main

raise SystemExit(main())
