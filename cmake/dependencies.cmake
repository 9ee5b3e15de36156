# Every third-party package, found once. README lists the Debian package of each.
find_package(Threads REQUIRED)
find_package(OpenMP REQUIRED COMPONENTS CXX)
find_package(MPI REQUIRED COMPONENTS C)
find_package(HDF5 REQUIRED COMPONENTS C)
find_package(fmt REQUIRED CONFIG)
find_package(tomlplusplus REQUIRED CONFIG)
find_package(nlohmann_json REQUIRED CONFIG)
find_package(Boost REQUIRED COMPONENTS program_options)
find_package(PkgConfig REQUIRED)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(SENTENCEPIECE REQUIRED IMPORTED_TARGET sentencepiece)

# HDF5 is used by one process at a time; the parallel flavour would drag mpi.h into storage/.
if(HDF5_IS_PARALLEL)
  message(FATAL_ERROR "the serial HDF5 is needed (Debian: libhdf5-dev), found a parallel one in ${HDF5_INCLUDE_DIRS}; "
                      "set HDF5_ROOT or HDF5_PREFER_PARALLEL=OFF")
endif()

# OpenBLAS in its OpenMP flavour, named by path and by run path: the soname is shared with the pthread
# flavour, which under OpenMP runs two thread pools on the same cores.
find_library(OPENBLAS_OPENMP_LIBRARY NAMES openblas
             HINTS ${TFORGE_OPENBLAS_DIR} /usr/lib/${CMAKE_LIBRARY_ARCHITECTURE}/openblas-openmp
                   /usr/lib/x86_64-linux-gnu/openblas-openmp NO_DEFAULT_PATH)
find_path(OPENBLAS_OPENMP_INCLUDE_DIR cblas.h
          HINTS ${TFORGE_OPENBLAS_DIR}/include /usr/include/x86_64-linux-gnu/openblas-openmp)
if(NOT OPENBLAS_OPENMP_LIBRARY OR NOT OPENBLAS_OPENMP_INCLUDE_DIR)
  message(FATAL_ERROR "OpenBLAS in its OpenMP flavour was not found (Debian: libopenblas-openmp-dev); "
                      "set TFORGE_OPENBLAS_DIR to the folder of its libopenblas.so")
endif()
get_filename_component(openblas_dir ${OPENBLAS_OPENMP_LIBRARY} DIRECTORY)
add_library(tforge_openblas INTERFACE)
target_include_directories(tforge_openblas SYSTEM INTERFACE ${OPENBLAS_OPENMP_INCLUDE_DIR})
target_link_libraries(tforge_openblas INTERFACE ${OPENBLAS_OPENMP_LIBRARY})
# DT_RPATH, not DT_RUNPATH: it also decides for libraries that are loaded by other libraries.
set(CMAKE_BUILD_RPATH ${openblas_dir})
set(CMAKE_INSTALL_RPATH ${openblas_dir})
add_link_options(LINKER:--disable-new-dtags)

# The C API of MPI; the removed C++ bindings stay out.
add_library(tforge_mpi INTERFACE)
target_link_libraries(tforge_mpi INTERFACE MPI::MPI_C)
target_compile_definitions(tforge_mpi INTERFACE OMPI_SKIP_MPICXX MPICH_SKIP_MPICXX)
