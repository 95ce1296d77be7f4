"""`python -m unidad.cli`."""

from unidad.cli import main

raise SystemExit(main())
