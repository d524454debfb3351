"""``python -m ganexport``."""

from ganexport.cli.main import main

main()
