"""Read an object store from inside a host: each line of standard input is a request, each line of output its answer.

``["glob", PATTERN]`` lists names, ``["get", NAME, FILE]`` downloads an object, and answers whether it exists.
"""

import json
import sys

from s3fs import S3FileSystem

fs = S3FileSystem(use_listings_cache=False)
for line in sys.stdin:
    operation, name, *rest = json.loads(line)
    if operation == "glob":
        answer = sorted(fs.glob(name))
    else:
        answer = fs.exists(name)
        if answer:
            try:
                fs.get_file(name, *rest)
            except FileNotFoundError:  # removed in between
                answer = False
    print(json.dumps(answer), flush=True)
