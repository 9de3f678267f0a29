// Global memory for kernels that run under simt.h: guard zones on both sides, to the byte.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#ifndef __SANITIZE_ADDRESS__
#error "build with -fsanitize=address: guard zones are its"
#endif

namespace simt {

inline constexpr size_t kGuardBytes = 1 << 20;

// `bytes` of NaN bits between two zones whose access AddressSanitizer reports. The pages are
// reserved, not committed: a buffer may be larger than the machine's memory. `poison` is the number
// of leading bytes to fill.
class Buffer {
 public:
  explicit Buffer(size_t bytes, size_t poison = SIZE_MAX) : bytes_(bytes) {
    void* base = mmap(nullptr, bytes + 2 * kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
      std::perror("mmap");
      std::exit(1);
    }
    data_ = static_cast<char*>(base) + kGuardBytes;
    for (size_t i = 0; i < bytes && i < poison; i++) data_[i] = static_cast<char>(0xff);
    __asan_poison_memory_region(base, kGuardBytes);
    __asan_poison_memory_region(data_ + bytes, kGuardBytes);
  }
  ~Buffer() {
    __asan_unpoison_memory_region(data_ - kGuardBytes, kGuardBytes);
    __asan_unpoison_memory_region(data_ + bytes_, kGuardBytes);
    munmap(data_ - kGuardBytes, bytes_ + 2 * kGuardBytes);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_;
  char* data_;
};

}  // namespace simt
