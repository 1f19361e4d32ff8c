"""Print pip's own configuration of this machine as shell exports that uv reads: its indexes, folders of wheels, certificate and constraints.

uv does not read pip's configuration, so behind a company's mirror, or with wheels lying on the disk, it would look elsewhere than pip.
Run with the interpreter whose pip is meant. `index-strategy` becomes pip's rule: the best version over all indexes.
"""

import shlex
import subprocess
import sys

VARIABLES = {  # pip's option: (uv's variable, what stands between several values)
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "no-index": ("UV_NO_INDEX", ""),
    "cert": ("SSL_CERT_FILE", ""),
    "default-timeout": ("UV_HTTP_TIMEOUT", ""),
    "timeout": ("UV_HTTP_TIMEOUT", ""),
}


def exports(listing: str) -> dict[str, str]:
    """uv's variables for `pip config list`'s lines `section.option='value'`; pip's own order, the last of a single value counts."""
    found = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for line in listing.splitlines():
        key, separator, quoted = line.partition("=")
        option = key.rpartition(".")[2]
        section = key.partition(".")[0]
        if not separator or option not in VARIABLES or section not in ("global", "install", ":env:"):
            continue
        variable, between = VARIABLES[option]
        values = quoted.strip("'\"").replace("\\n", " ").split()
        if between and variable in found:
            values = [
                *found[variable].split(between),
                *(value for value in values if value not in found[variable].split(between)),
            ]
        found[variable] = (between or " ").join(values)
    return found


if __name__ == "__main__":
    pip = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    for name, value in exports(pip.stdout).items():
        print(f"export {name}={shlex.quote(value)}")
