"""``python -m distlenet.evaluate``, for networks that are defined next to this file."""

from distlenet.evaluate import main

if __name__ == "__main__":
    main()
