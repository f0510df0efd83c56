# llama.cpp's CMake reads this before each of its projects (.cargo/config.toml).
include("${CMAKE_CURRENT_LIST_DIR}/architectures.cmake")

# How ggml's threads wait for one another.
if(CMAKE_HOST_SYSTEM_NAME STREQUAL "Linux")
    cmake_path(SET bupo_waiting NORMALIZE "${CMAKE_CURRENT_LIST_DIR}/../../../ggml-ext/waiting.h")
    add_compile_options("SHELL:$<$<COMPILE_LANGUAGE:C>:-include ${bupo_waiting}>")
endif()

# ggml's products on a matrix unit (AMX) are left out: GCC 12 drops the stores of the tiles' shapes (`_tile_loadconfig` of its
# headers names 8 of the 64 bytes that are read), and a stock model ends with an illegal instruction. Ours are in src/ops/amx/.
if(CMAKE_HOST_SYSTEM_NAME STREQUAL "Linux")
    add_compile_options("SHELL:$<$<COMPILE_LANGUAGE:C,CXX>:-U__AMX_INT8__>")
endif()
