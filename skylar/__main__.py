"""`python -m skylar`, for torchrun and for machines without the script on their path."""

from skylar.cli import main

raise SystemExit(main())
