#!/usr/bin/env bash
# Builds the Dockerfile and runs the image, without a daemon, a registry or a GPU:  bash tests/docker.sh [scratch folder]
# On demand: a base image is made from the distribution's packages, the image with a CPU build of torch, then minitron is run in it.
# Needs root, buildah and debootstrap, ten minutes and 15 GB. pip's own settings are handed into the build.
#
#   TORCH    requirement of torch in the image (default: torch>=2.11, as pip's settings find it)
#   PACKAGES a site-packages folder with torch and the dependencies, of the Python of the base image: seen from inside instead of installed
#   MIRROR   where debootstrap finds packages (default: the first of this machine's apt sources)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
scratch="$(mkdir -p "${1:-/tmp/minitron-image}" && cd "${1:-/tmp/minitron-image}" && pwd)"
for name in buildah debootstrap; do
    command -v "$name" >/dev/null || {
        echo "THE IMAGE IS NOT TESTED: $name is not installed (Debian: buildah crun debootstrap)" >&2
        exit 2
    }
done

printf '[storage]\ndriver = "vfs"\nrunroot = "%s/run"\ngraphroot = "%s/graph"\n' "$scratch" "$scratch" >"$scratch/storage.conf"
export CONTAINERS_STORAGE_CONF="$scratch/storage.conf" BUILDAH_ISOLATION=chroot

# shellcheck source=/dev/null
suite="$(source /etc/os-release && printf '%s' "$VERSION_CODENAME")"
if [[ ! -e "$scratch/rootfs/etc/os-release" ]]; then
    # shellcheck disable=SC2016 # apt's own variable
    mirror="${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)}"
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv "$suite" "$scratch/rootfs" "$mirror"
fi
# The machine's certificates: a local mirror may have one of its own.
cp /etc/ssl/certs/ca-certificates.crt "$scratch/rootfs/etc/ssl/certs/ca-certificates.crt"
printf 'FROM scratch\nADD rootfs /\nCMD ["/bin/bash"]\n' >"$scratch/Base"
buildah bud --pull-never --tag localhost/minitron-base --file "$scratch/Base" "$scratch"

# pip's settings of this machine, and the folders that they name.
mounts=(--volume "$scratch/pip.conf:/etc/pip.conf:ro")
while read -r folder; do mounts+=(--volume "$folder:$folder:ro"); done < <(python3 - "$scratch/pip.conf" <<'PYTHON'
import ast, os, subprocess, sys
found = {}
for line in subprocess.run(["pip", "config", "list"], capture_output=True, text=True).stdout.splitlines():
    key, _, value = line.partition("=")
    found[key.rpartition(".")[2]] = ast.literal_eval(value)
found.pop("cert", None)  # the image has its own copy
with open(sys.argv[1], "w") as file:
    file.write("[global]\n" + "".join(f"{key} = {value}\n" for key, value in found.items()))
words = {word.rpartition("://")[2].removesuffix("/simple") for value in found.values() for word in value.split()}  # an index points outside itself
print("\n".join(sorted(word for word in words if word.startswith("/") and os.path.isdir(word))))
PYTHON
)
seen=()
if [[ -n "${PACKAGES:-}" ]]; then
    version="$(chroot "$scratch/rootfs" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    seen=(--volume "$PACKAGES:/usr/local/lib/python$version/dist-packages:ro")
fi
SECONDS=0
buildah bud --pull-never "${mounts[@]}" "${seen[@]}" --build-arg BASE_IMAGE=localhost/minitron-base --build-arg RUNTIME_IMAGE=localhost/minitron-base \
    --build-arg TORCH="${TORCH:-torch>=2.11}" --tag localhost/minitron --file "$root/Dockerfile" "$root"
echo "built in $SECONDS s"

container="$(buildah from --pull-never localhost/minitron)"
trap 'buildah rm "$container" >/dev/null' EXIT
inside() { buildah run "${seen[@]}" "$container" -- "$@"; }

[[ "$(inside id -u)" == 10001 ]]
inside minitron --version
inside minitron plan experiment=minitron_4b --device h100 --devices 64
inside python -c 'import os; from minitron.ops.build import load; found = load("kd_loss", "host"); print(found); assert os.environ["MINITRON_KERNELS"] in str(found)'
# Two ranks by the image's own launch script: bad input is one sentence and code 2.
code=0
inside env NPROC_PER_NODE=2 bash /opt/minitron/launch/torchrun.sh distill engine=fsdp data=python_docs training.num_steps=1 teacher.path=/nowhere \
    2>"$scratch/said" || code=$?
if [[ "$code" != 2 ]] || ! grep -qx 'minitron: teacher.path=/nowhere does not exist' "$scratch/said"; then
    echo "torchrun.sh left with $code: $(cat "$scratch/said")" >&2
    exit 1
fi
buildah inspect --type image --format '{{.OCIv1.Config.User}} {{.OCIv1.Config.Entrypoint}}' localhost/minitron
du -sh "$scratch/graph"
echo "the image is sound"
