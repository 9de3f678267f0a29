// The arguments of one launch, read from a file that tests/simt/harness.py writes, and its results.
//
// A file is a sequence of records: name (24 bytes, padded with 0), kind, size, then for kind
// 0: nothing, `size` is the number itself; 1: an array of `size` bytes, of which the file gives
// `count` pieces (offset, length, bytes). Numbers are 64-bit. Results: the pieces again, in order.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "buffer.h"
#include "types.h"

namespace simt {

class Case {
 public:
  explicit Case(const char* path) {
    File file(path, "rb");
    char name[24];
    while (std::fread(name, 1, sizeof name, file.handle) == sizeof name) {
      const int64_t kind = file.number(), size = file.number();
      if (kind == 0) {
        numbers_[name] = size;
        continue;
      }
      Array& array = arrays_[name];
      array.buffer = std::make_unique<Buffer>(size, kPoisonedBytes);
      for (int64_t count = file.number(); count > 0; count--) {
        const int64_t offset = file.number(), length = file.number();
        array.pieces.push_back({offset, length});
        file.read(array.buffer->data() + offset, length);
      }
    }
  }

  void write(const char* path) const {
    File file(path, "wb");
    for (const auto& [name, array] : arrays_)
      for (const auto& [offset, length] : array.pieces)
        std::fwrite(array.buffer->data() + offset, 1, length, file.handle);
  }

  int64_t number(const std::string& name) const { return find(numbers_, name); }
  bool has(const std::string& name) const { return arrays_.count(name); }
  // First element of the tensor, null if it was not given.
  template <class T = void>
  T* data(const std::string& name) const {
    if (!has(name)) return nullptr;
    return reinterpret_cast<T*>(find(arrays_, name).buffer->data() + number(name + ".offset"));
  }
  efrdn_fast::Map map(const std::string& name) const {
    if (!has(name)) return {};
    return {data(name), number(name + ".n"), number(name + ".h"), number(name + ".w")};
  }
  efrdn_fast::Dtype dtype(const std::string& name) const {
    return static_cast<efrdn_fast::Dtype>(number(name + ".dtype"));
  }

 private:
  static constexpr size_t kPoisonedBytes = 64 << 20;
  struct Array {
    std::unique_ptr<Buffer> buffer;
    std::vector<std::pair<int64_t, int64_t>> pieces;
  };
  struct File {
    FILE* handle;
    File(const char* path, const char* mode) : handle(std::fopen(path, mode)) {
      if (!handle) stop(path);
    }
    ~File() { std::fclose(handle); }
    void read(void* to, size_t bytes) {
      if (std::fread(to, 1, bytes, handle) != bytes) stop("case file is cut short");
    }
    int64_t number() {
      int64_t value;
      read(&value, sizeof value);
      return value;
    }
  };

  [[noreturn]] static void stop(const char* what) {
    std::fprintf(stderr, "case: %s\n", what);
    std::exit(1);
  }
  template <class M>
  static const typename M::mapped_type& find(const M& map, const std::string& name) {
    const auto found = map.find(name);
    if (found == map.end()) stop(("missing argument " + name).c_str());
    return found->second;
  }

  std::map<std::string, int64_t> numbers_;
  std::map<std::string, Array> arrays_;
};

}  // namespace simt
