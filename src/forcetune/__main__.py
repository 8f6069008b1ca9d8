"""``python -m forcetune``, as ``torchrun -m`` needs it."""

from forcetune.cli import main

main()
