#!/usr/bin/env bash
# scripts/make_bundle.sh [--output DIR] [--build DIR]: one archive that runs on any Linux of x86-64 with glibc 2.36 or
# newer and no package of ours: the jobs, the step benchmark, the tests with what they read, the libraries, the MPI
# launcher, a text to train on, the licences. Unpacked by `tar xf`, used as bundle/README.md says. --output: where the archive goes,
# default out/.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

output=out build=build
while (($# > 0)); do
  case $1 in
    --output | --build)
      (($# > 1)) || die "$1 needs a value"
      if [[ $1 == --output ]]; then output=$(absolute "$2"); else build=$(absolute "$2"); fi
      shift 2
      ;;
    *) die "unknown option $1 (usage: scripts/make_bundle.sh [--output DIR] [--build DIR])" ;;
  esac
done
[[ -x $build/jobs/tf_train ]] || die "$build/jobs/tf_train is missing; run scripts/build.sh $build"
for tool in patchelf xz readelf; do
  command -v "$tool" >/dev/null || die "$tool is missing (Debian: apt-get install patchelf xz-utils binutils)"
done

# What the system of the target brings: the C library and the loader, and a GPU's driver.
of_the_system='^(linux-vdso|ld-linux.*|libc|libm|libpthread|libdl|librt|libresolv|libutil|libanl|libnsl|libmvec|libcuda)\.so'
# Too large to carry, and tied to the target's driver: cuBLASLt comes from the target, which the programs load when they
# are asked for a device. The runtime of CUDA is part of the programs.
of_the_target='^(libcudart|libcublas|libcublasLt|libnccl|libcudnn.*)\.so'
# Plugins of networks and schedulers that would bring great trees of libraries. On InfiniBand use the cluster's own MPI.
plugins_left_out='_(ofi|openib|psm|psm2|ucx|uct|usnic|gridengine|flux|monitoring|treematch|netlink|jsm)\.so$'

name=tokenforge-$("$build/jobs/tf_train" --version | sed -nE '1s/^[^ ]+ ([^ ,]+),.*/\1/p')-linux-x86_64
mkdir -p "$output"
work=$(mktemp -d "$output/.bundle.XXXXXX")
trap 'rm -rf "$work"' EXIT
root=$work/$name
mkdir -p "$root"/{bin,lib,libexec/tests,share/licenses,share/tokenforge/data}

say "programs"
cmake --install "$build" --prefix "$work/installed" --strip >/dev/null
cp "$work"/installed/bin/* "$root/libexec/"
cp -r "$work"/installed/share/tokenforge/. "$root/share/tokenforge/"
for test in "$build"/tests/*_test "$build"/tests/launch/heartbeat_test; do
  [[ $test != *_emulated_test ]] || continue  # for machines that build
  strip -o "$root/libexec/tests/${test##*/}" "$test"
done
for bench in step_bench device_bench; do strip -o "$root/libexec/$bench" "$build/bench/$bench"; done
over_mpi=$build/tests/support/nccl_shim/cuda/libnccl.so.2
if [[ -f $over_mpi ]]; then
  mkdir "$root/lib/nccl_over_mpi"
  strip -o "$root/lib/nccl_over_mpi/${over_mpi##*/}" "$over_mpi"
fi
# What the tests read lies where it does in the sources.
git ls-files tests/golden tests/compat configs README.md bench/compare_device.py bench/compare_step.py bench/pytorch_peer.py bench/pytorch_attention.py | tar cf - -T - | tar xf - -C "$root/share/tokenforge"
bible -f gen1:1-rev22:21 >"$root/share/tokenforge/data/bible.txt" || die "no bible (Debian: apt-get install bible-kjv)"
cp scripts/bundle/{README.md,env.sh,checks.sh,self_check.sh,gpu_check.sh} "$root/"
cp scripts/bundle/start "$root/libexec/"

say "MPI"
machine=lib/x86_64-linux-gnu
plugins=$machine/openmpi/lib/openmpi3 pmix=$machine/pmix2
[[ -d /usr/$plugins ]] || die "/usr/$plugins is missing: a bundle is made on Debian 12 (libopenmpi3)"
mkdir -p "$root/$plugins" "$root/$pmix/lib/pmix" "$root/$pmix/share" "$root/etc/openmpi"
for plugin in /usr/"$plugins"/*.so; do
  [[ $plugin =~ $plugins_left_out ]] || cp -L "$plugin" "$root/$plugins/"
done
cp -L /usr/"$pmix"/lib/pmix/*.so "$root/$pmix/lib/pmix/"
cp -rL /usr/share/openmpi "$root/share/"
cp -rL "/usr/$pmix/share/pmix" "$root/$pmix/share/"
cp -L /etc/openmpi/openmpi-mca-params.conf "$root/etc/openmpi/"
: >"$root/etc/openmpi/openmpi-default-hostfile"
cp -L /usr/bin/orterun /usr/bin/orted "$root/libexec/"
for program in "$root"/libexec/*; do
  [[ -f $program && ${program##*/} != start ]] || continue
  called=${program##*/}
  [[ $called != orterun ]] || called=mpirun
  ln -s ../libexec/start "$root/bin/$called"
done

say "libraries"
mapfile -t loaded < <(find "$root/libexec" -type f ! -name start && find "$root/lib" -name '*.so')
declare -A packages=()
while read -r library path; do
  [[ ! $library =~ $of_the_system && ! $library =~ $of_the_target ]] || continue
  cp -L "$path" "$root/lib/$library"
  package=$(dpkg -S "$(realpath "$path")" 2>/dev/null | cut -d: -f1) || package=$(dpkg -S "$path" | cut -d: -f1)
  packages[$package]=yes
done < <(ldd "${loaded[@]}" 2>/dev/null | awk '$2 == "=>" && $3 ~ /^\// {print $1, $3}' | sort -u)
missing=$(ldd "${loaded[@]}" 2>/dev/null | awk '/not found/ {print $1}' | sort -u | grep -vE "$of_the_target" || true)
[[ -z $missing ]] || die "libraries were not found: $missing"
for package in "${!packages[@]}" openmpi-bin bible-kjv bible-kjv-text; do
  if [[ -e /usr/share/doc/$package/copyright ]]; then cp -L "/usr/share/doc/$package/copyright" "$root/share/licenses/$package"; fi
done
cp LICENSE "$root/share/licenses/tokenforge"
# A program's DT_RPATH also holds for what it loads later, unless a library has a path of its own.
chmod -R u+w "$root"
beside='$''ORIGIN'
for program in "${loaded[@]}"; do
  case $program in
    */libexec/tests/*) patchelf --force-rpath --set-rpath "$beside/../../lib" "$program" ;;
    */libexec/*) patchelf --force-rpath --set-rpath "$beside/../lib" "$program" ;;
    *) patchelf --remove-rpath "$program" ;;
  esac
done
for library in "$root"/lib/*.so* "$root"/lib/nccl_over_mpi/*; do patchelf --remove-rpath "$library"; done

say "archive"
newest=$(find "$root" -type f \( -path '*/libexec/*' -o -name '*.so*' \) ! -name start -print0 | xargs -0 readelf --version-info 2>/dev/null |
  grep -oE 'GLIBC_[0-9]+\.[0-9]+' | sort -uV | tail -1)
[[ -n $newest ]] || die "no version of glibc found in the programs"
# Programs and tests hold the same kernels for devices: a dictionary that reaches back over several of them.
tar cf - --sort=name --owner=0 --group=0 --numeric-owner -C "$work" "$name" |
  xz -T0 --lzma2=preset=3,dict=128MiB >"$work/$name.tar.xz"
size=$(stat --format=%s "$work/$name.tar.xz")
((size < 45 * 1024 * 1024)) || die "the archive has $((size >> 20)) MiB, over 45"
mv "$work/$name.tar.xz" "$output/"
echo "$output/$name.tar.xz: $((size >> 20)) MiB, $(du -sm "$root" | cut -f1) MiB unpacked, needs ${newest/_/ } or newer"
