// A regular file mapped into memory, read-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fastgen::io {

// The mapping is private and read-only. Its size is that of the file when it was opened: reading
// after somebody truncates the file raises SIGBUS, as with every mapping. Whoever replaces a model
// while it loads must write a new file and rename it.
class MappedFile {
 public:
  // Throws base::Error: kNotFound with the system's reason, kBadFile if it is no regular file.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  const char* data() const { return data_; }  // null for an empty file
  uint64_t size() const { return size_; }

  // Bytes [begin, end) are not needed any more: the pages that lie wholly inside leave this
  // process's memory. They may still be read; they come back from the file.
  void DropPages(uint64_t begin, uint64_t end) const;

 private:
  std::string path_;
  const char* data_ = nullptr;
  uint64_t size_ = 0;
};

// A small text file as a string. Throws as MappedFile does, and kBadFile above `max_bytes`.
std::string ReadTextFile(const std::string& path, uint64_t max_bytes);

}  // namespace fastgen::io
