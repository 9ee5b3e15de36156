# shellcheck shell=sh
# Sourced with `root` set to the bundle's folder: what Open MPI asks for to run from a folder that was not its own.
export OPAL_PREFIX="${root:?}"
export OPAL_SYSCONFDIR="$root/etc/openmpi" OPAL_DATADIR="$root/share" OPAL_PKGDATADIR="$root/share/openmpi"
export OPAL_LIBDIR="$root/lib/x86_64-linux-gnu/openmpi/lib"
export OPAL_PKGLIBDIR="$OPAL_LIBDIR/openmpi3"
export PMIX_INSTALL_PREFIX="$root/lib/x86_64-linux-gnu/pmix2"
export PMIX_MCA_pcompress_base_silence_warning=1
# The host's own plugins of hwloc were built for another library.
export HWLOC_PLUGINS_PATH="$root/lib/hwloc"
# Without ssh a launcher for one machine is enough, but Open MPI wants to see some agent.
if [ -z "${OMPI_MCA_plm_rsh_agent:-}" ] && ! command -v ssh >/dev/null 2>&1; then
  export OMPI_MCA_plm_rsh_agent=/bin/sh
fi
