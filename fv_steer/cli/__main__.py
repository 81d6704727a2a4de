"""`python -m fv_steer.cli`."""

from fv_steer.cli import main

main()
