"""``python -m custom_quantizer`` is ``custom-quantizer``."""

from custom_quantizer.app.cli import main

if __name__ == "__main__":
    main()
