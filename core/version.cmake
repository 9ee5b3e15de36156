# Run by every build (cmake -P): reads the commit, and rewrites version_info.h only when something changed, so that
# an unchanged commit compiles nothing.
set(TFORGE_COMMIT unknown)
find_program(GIT git)
if(GIT AND EXISTS ${SOURCE}/.git)
  execute_process(COMMAND ${GIT} --no-optional-locks -C ${SOURCE} rev-parse --short=12 HEAD
                  OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
  if(NOT failed)
    set(TFORGE_COMMIT ${commit})
    execute_process(COMMAND ${GIT} --no-optional-locks -C ${SOURCE} diff --quiet HEAD RESULT_VARIABLE changed)
    if(changed)
      string(APPEND TFORGE_COMMIT "+")
    endif()
  endif()
endif()
configure_file(${SOURCE}/core/version_info.h.in ${OUTPUT} @ONLY)
