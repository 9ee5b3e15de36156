# tforge_layer(<folder> [DEPS ...] [USES ...] [LIBS ...] [USES_LIBS ...] [CUDA_LIBS ...])
#   DEPS       layers whose headers may appear in this folder's headers   (public)
#   USES       layers that only this folder's .cpp files may include      (private)
#   LIBS       third-party targets of this folder's headers               (public)
#   USES_LIBS  third-party targets never visible above this folder        (private)
#   CUDA_LIBS  the folder has CUDA code, which needs these                (private; nothing without CUDA)
# Every .cpp below the folder belongs to it: a new op is a new file, no list is edited. What lies in its cuda/ (.cpp and
# .cu) belongs to builds with CUDA alone.
function(tforge_layer name)
  cmake_parse_arguments(PARSE_ARGV 1 L "" "" "DEPS;USES;LIBS;USES_LIBS;CUDA_LIBS")
  foreach(dep IN LISTS L_DEPS L_USES)
    if(NOT TARGET tforge_${dep})
      message(FATAL_ERROR "layer '${name}' may not depend on '${dep}': '${dep}' is not below it")
    endif()
  endforeach()
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.cpp)
  list(FILTER sources EXCLUDE REGEX "^${CMAKE_CURRENT_SOURCE_DIR}/cuda/")
  if(TFORGE_HAVE_CUDA)
    file(GLOB_RECURSE cuda_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cpp
         ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cu)
    list(APPEND sources ${cuda_sources})
  endif()
  if(NOT sources)  # nothing here yet
    add_library(tforge_${name} INTERFACE)
    return()
  endif()
  add_library(tforge_${name} ${sources})

  # The compiler sees this folder, and only this folder, under its own name: an include of a layer
  # that was not named as a dependency is "No such file".
  set(view ${CMAKE_BINARY_DIR}/view/${name})
  file(MAKE_DIRECTORY ${view})
  file(CREATE_LINK ${CMAKE_SOURCE_DIR}/${name} ${view}/${name} SYMBOLIC)
  target_include_directories(tforge_${name} PUBLIC ${view})

  if(TFORGE_HAVE_CUDA AND L_CUDA_LIBS)
    list(APPEND L_USES_LIBS ${L_CUDA_LIBS})
    target_compile_definitions(tforge_${name} PRIVATE TFORGE_WITH_CUDA)
    # constexpr functions of our headers run on the device too.
    target_compile_options(tforge_${name} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
  endif()

  list(TRANSFORM L_DEPS PREPEND tforge_)
  list(TRANSFORM L_USES PREPEND tforge_)
  target_link_libraries(tforge_${name} PUBLIC ${L_DEPS} ${L_LIBS} PRIVATE ${L_USES} ${L_USES_LIBS}
                                       PRIVATE tforge_warnings)
  if(TFORGE_STRICT)
    # A shared layer without undefined symbols cannot call upwards through a hand-written declaration,
    # and each header must compile with nothing but what the layer shows its clients.
    target_link_options(tforge_${name} PRIVATE LINKER:-z,defs)
    file(GLOB_RECURSE headers RELATIVE ${CMAKE_SOURCE_DIR} CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.h)
    set(units)
    foreach(header IN LISTS headers)
      set(unit ${CMAKE_BINARY_DIR}/header_check/${header}.cpp)
      file(CONFIGURE OUTPUT ${unit} CONTENT "#include \"${header}\"\n")
      list(APPEND units ${unit})
    endforeach()
    if(units)
      add_library(tforge_${name}_headers OBJECT ${units})
      target_link_libraries(tforge_${name}_headers PRIVATE tforge_${name})
    endif()
  endif()
endfunction()
