"""``python -m distlenet.data [--config FILE]... [key=value]...``: locate, download or decode the configured data."""

from distlenet.config.arguments import parse_arguments
from distlenet.config.loading import load_config
from distlenet.data.sources import load_data
from distlenet.distributed.entry_point import run_entry


def main() -> None:
    """Print the source of the configured data set, after its download, also from Debian's package, and its decoding."""
    purpose = "Locate or download the configured data set, verify it, and decode image files into data.cache."
    files, overrides = parse_arguments("distlenet.data", purpose)
    config = load_config(files, overrides).data
    data = load_data(config, fetch=True)
    print(f"{config.name}: {len(data.train)} training and {len(data.test)} test images, verified, in {data.source}")


if __name__ == "__main__":
    run_entry(main)
