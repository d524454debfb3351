# Which GPUs the kernels are compiled for.
#
# A list given by the caller (CMAKE_CUDA_ARCHITECTURES or $CUDAARCHS) stands. Otherwise: this machine's GPUs, if it
# has any, and portable code for the rest, which the driver compiles on first use: compute capability 7.5 for every
# GPU supported, 9.0 for those with thread block clusters. That keeps an installation without a GPU at one quick
# compilation instead of minutes for every architecture; "all" asks for those minutes.

# Before enable_language(CUDA), which needs a list that it can try the compiler with.
macro(ganexport_choose_architectures)
  if(CMAKE_CUDA_ARCHITECTURES STREQUAL "all")
    set(GANEXPORT_ALL_ARCHITECTURES ON)
    set(CMAKE_CUDA_ARCHITECTURES 75)
  elseif(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    set(CMAKE_CUDA_ARCHITECTURES 75-virtual 90-virtual)
    find_program(GANEXPORT_NVIDIA_SMI nvidia-smi)
    if(GANEXPORT_NVIDIA_SMI)
      execute_process(
        COMMAND ${GANEXPORT_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
        OUTPUT_VARIABLE capabilities ERROR_QUIET RESULT_VARIABLE failed)
      string(REGEX MATCHALL "[0-9]+[.][0-9]" capabilities "${capabilities}")
      if(NOT failed)
        foreach(capability IN LISTS capabilities)
          string(REPLACE "." "" capability "${capability}")
          list(APPEND CMAKE_CUDA_ARCHITECTURES "${capability}-real")
        endforeach()
        list(REMOVE_DUPLICATES CMAKE_CUDA_ARCHITECTURES)
      endif()
    endif()
  endif()
endmacro()

# "all", once the compiler's version is known: machine code for each major architecture and for the minor ones that
# are common, and portable code of the newest for what comes later.
macro(ganexport_expand_architectures)
  if(GANEXPORT_ALL_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90-real)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      list(APPEND CMAKE_CUDA_ARCHITECTURES 100-real)
      if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
        list(APPEND CMAKE_CUDA_ARCHITECTURES 110-real)
      endif()
      list(APPEND CMAKE_CUDA_ARCHITECTURES 120-real 120-virtual)
    else()
      list(APPEND CMAKE_CUDA_ARCHITECTURES 90-virtual)
    endif()
  endif()
endmacro()
