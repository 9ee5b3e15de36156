#!/usr/bin/env bash
# bare_root.sh BUILD: makes a bundle of BUILD, unpacks it in a root file system that holds the C library and a shell with a
# few tools, nothing else, and runs its self_check.sh there, and its gpu_check.sh, which must say that there is no device. Needs root or user name spaces, and patchelf; without them it
# exits 77, which CTest reads as skipped.
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/common.sh"
build=$1

skip() {
  echo "skipped: $*"
  exit 77
}
command -v patchelf >/dev/null || skip "patchelf is not installed"
apart=(unshare --mount)
if ((EUID != 0)); then apart+=(--user --map-root-user); fi
"${apart[@]}" true 2>/dev/null || skip "neither root nor user name spaces"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
scripts/make_bundle.sh --output "$work/out" --build "$build"

root=$work/root
mkdir -p "$root"/{bin,lib/x86_64-linux-gnu,lib64,usr,dev,proc,sys,tmp,home,etc}
ln -s ../bin "$root/usr/bin"
echo 'root:x:0:0:root:/home:/bin/sh' >"$root/etc/passwd"
programs=(awk bash sh cat cp cut date dirname env grep head hostname ls mkdir mktemp nproc readlink rm sed sort tail tar
  timeout uname xz)
for program in "${programs[@]}"; do cp -L "$(command -v "$program")" "$root/bin/"; done
cp -L /lib64/ld-linux-x86-64.so.2 "$root/lib64/"
{
  dpkg -L libc6 | grep '^/lib/.*\.so'
  ldd "$root"/bin/* | awk '$2 == "=>" {print $3}'
} | sort -u | xargs cp -L -t "$root/lib/x86_64-linux-gnu/"
for library in libmpi libhdf5 libopenblas libsentencepiece libstdc++ libfmt; do
  [[ -z $(find "$root" -name "$library*") ]] || die "the root is not bare: it has $library"
done

# A root of its own, which sees the machine's devices and processes; the mounts end with the process.
archive=("$work"/out/*.tar.xz)
cp "${archive[0]}" "$root/home/bundle.tar.xz"
# shellcheck disable=SC2016  # $0 and $system are the inner shell's
"${apart[@]}" bash -c '
  for system in dev proc sys; do mount --rbind /$system "$0/$system"; done
  exec chroot "$0" /bin/env -i PATH=/bin HOME=/home /bin/bash -c "cd /home && tar xf bundle.tar.xz && tokenforge-*/self_check.sh &&
    { tokenforge-*/gpu_check.sh >gpu.log; status=\$?; cat gpu.log; [[ \$status == 1 ]]; } &&
    grep -q \"model_test: tests were skipped, or there are none: no CUDA device: \" gpu.log &&
    grep -Eq \"losses differ under 1e-3 +ok \" gpu.log"
' "$root"
