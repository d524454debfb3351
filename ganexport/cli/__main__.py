"""``python -m ganexport.cli``."""

from ganexport.cli.main import main

main()
