# Cross-compiles for 64-bit Arm Linux: cmake -DCMAKE_TOOLCHAIN_FILE=tests/emulators/arm/aarch64.cmake ...
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)  # static programs run under qemu-user without an Arm system
