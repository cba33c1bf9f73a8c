"""``python -m distlenet.data [--config FILE]... [key=value]...``: find or get the data, and say where."""

from distlenet.config.arguments import parse_arguments
from distlenet.config.loading import load_config
from distlenet.data.sources import load_data
from distlenet.distributed.entry_point import run_entry


def main() -> None:
    """Get and verify the configured data set; tries Debian's package too where a download fails."""
    files, overrides = parse_arguments("distlenet.data", "Find or download the configured data set, and verify it.")
    config = load_config(files, overrides)
    data = load_data(config.data, debian=True)
    print(
        f"{config.data.name}: {len(data.train)} training and {len(data.test)} test images, verified, in {data.source}"
    )


if __name__ == "__main__":
    run_entry(main)
