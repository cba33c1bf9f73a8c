#!/usr/bin/env bash
# make test-container: build launch/Containerfile with buildah, and train in the image as its user. Needs root on Debian.
#
# No registry of images is needed: debootstrap makes the base. PyTorch and the other packages of .venv are mounted, so that
# pip finds them installed; their download is not tested. Takes minutes and 1 GB of disk.
set -euo pipefail
cd "$(dirname "$0")/../.."
packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
scratch=$(mktemp -d)
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-overlay} XDG_RUNTIME_DIR=$scratch
buildah() { command buildah --root "$scratch/store" --runroot "$scratch/run" "$@"; }
finish() { buildah rm --all > /dev/null 2>&1 || true; rm -rf "$scratch"; }
trap finish EXIT

debootstrap --variant=minbase --include=python3-pip,python-is-python3 bookworm "$scratch/base" > "$scratch/log" ||
  { tail "$scratch/log" >&2; exit 1; }
rm -f "$scratch"/base/usr/lib/python3*/EXTERNALLY-MANAGED "$scratch"/base/var/cache/apt/archives/*.deb
mkdir "$scratch/base/packages"  # links to all but the checkout, which pip would otherwise replace
for path in "$packages"/*; do
  [[ $path == *distlenet* ]] || ln -s "/mnt/${path##*/}" "$scratch/base/packages"
done
echo /packages > "$scratch/base/usr/lib/python3/dist-packages/packages.pth"
base=$(buildah from scratch)
buildah add --quiet "$base" "$scratch/base" / > "$scratch/log"
buildah config --env PIP_CERT=/etc/ssl/certs/ca-certificates.crt "$base"
buildah commit --quiet --rm "$base" localhost/base > "$scratch/log"

mounts=(--volume "$packages:/mnt:ro" --volume /etc/ssl/certs:/etc/ssl/certs:ro)
buildah build --quiet "${mounts[@]}" --build-arg BASE=localhost/base --build-arg TORCH_INDEX=https://pypi.org/simple \
  --file launch/Containerfile --tag localhost/distlenet . > "$scratch/log" 2>&1 || { cat "$scratch/log" >&2; exit 1; }

container=$(buildah from localhost/distlenet)
run() { buildah run "${mounts[@]}" "$container" -- "$@"; }
[ "$(buildah inspect --format '{{.OCIv1.Config.Entrypoint}} {{.OCIv1.Config.User}}' "$container")" = "[distlenet] 1000:1000" ]
[ "$(run sh -c 'id -u; pwd' | xargs)" = "1000 /work" ]
run python -c 'import distlenet; assert distlenet.__file__.startswith("/usr/local/"), distlenet.__file__'
run distlenet train --config ci train.epochs=2 run.name=first | tee "$scratch/log"
run distlenet evaluate checkpoint=runs/first
grep -q "Files of this run: runs/first" "$scratch/log"
