# llama.cpp's CMake reads this before each of its projects (.cargo/config.toml).
include("${CMAKE_CURRENT_LIST_DIR}/architectures.cmake")

# How ggml's threads wait for one another.
if(CMAKE_HOST_SYSTEM_NAME STREQUAL "Linux")
    cmake_path(SET bupo_waiting NORMALIZE "${CMAKE_CURRENT_LIST_DIR}/../../../ggml-ext/waiting.h")
    add_compile_options("SHELL:$<$<COMPILE_LANGUAGE:C>:-include ${bupo_waiting}>")
endif()
