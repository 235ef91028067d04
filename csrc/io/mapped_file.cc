#include "io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <limits>

#include "base/error.h"

namespace fastgen::io {

namespace {

// An open file descriptor of a regular file, and its size.
class OpenFile {
 public:
  explicit OpenFile(const std::string& path) {
    // O_NONBLOCK: opening a named pipe must not wait for a writer.
    do {
      descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    } while (descriptor_ < 0 && errno == EINTR);
    if (descriptor_ < 0) {
      const int error = errno;
      throw base::Error(FASTGEN_NOT_FOUND, path + ": cannot be opened: " + base::ErrnoText(error));
    }
    struct stat status;
    if (fstat(descriptor_, &status) != 0) {
      const int error = errno;
      close(descriptor_);
      throw base::Error(FASTGEN_NOT_FOUND, path + ": cannot be read: " + base::ErrnoText(error));
    }
    if (!S_ISREG(status.st_mode)) {
      close(descriptor_);
      throw base::Error(FASTGEN_BAD_FILE,
                        path + (S_ISDIR(status.st_mode) ? ": is a directory, not a file"
                                                        : ": is not a regular file"));
    }
    size_ = static_cast<uint64_t>(status.st_size);
  }
  ~OpenFile() { close(descriptor_); }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  int descriptor() const { return descriptor_; }
  uint64_t size() const { return size_; }

 private:
  int descriptor_ = -1;
  uint64_t size_ = 0;
};

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const OpenFile file(path);
  size_ = file.size();
  if (size_ == 0) return;
  void* mapping = MAP_FAILED;
  if (size_ <= std::numeric_limits<size_t>::max()) {
    mapping = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.descriptor(), 0);
  } else {
    errno = ENOMEM;
  }
  if (mapping == MAP_FAILED) {
    const int error = errno;
    throw base::Error(
        error == ENOMEM ? FASTGEN_OUT_OF_MEMORY : FASTGEN_NOT_FOUND,
        path + ": " + std::to_string(size_) + " bytes cannot be mapped: " + base::ErrnoText(error));
  }
  // Packing goes through the file from front to back: read far ahead, keep little behind.
  // Advice only, so a refusal is no error.
  madvise(mapping, size_, MADV_SEQUENTIAL);
  data_ = static_cast<const char*>(mapping);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<char*>(data_), size_);
}

void MappedFile::DropPages(uint64_t begin, uint64_t end) const {
  static const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  if (data_ == nullptr || begin >= end || end > size_) return;
  const uint64_t first = (begin + page - 1) / page * page;
  // The file's last page is wholly ours even though the file ends inside it.
  const uint64_t last = end == size_ ? (end + page - 1) / page * page : end / page * page;
  if (first < last) madvise(const_cast<char*>(data_) + first, last - first, MADV_DONTNEED);
}

std::string ReadTextFile(const std::string& path, uint64_t max_bytes) {
  const OpenFile file(path);
  if (file.size() > max_bytes) {
    throw base::Error(FASTGEN_BAD_FILE, path + ": has " + std::to_string(file.size()) +
                                            " bytes, at most " + std::to_string(max_bytes) +
                                            " are allowed");
  }
  std::string text(file.size(), '\0');
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t count = read(file.descriptor(), &text[done], text.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) {
      const int error = errno;
      throw base::Error(FASTGEN_NOT_FOUND, path + ": cannot be read: " + base::ErrnoText(error));
    }
    if (count == 0) break;  // it shrank meanwhile; what is left says whether it is whole
    done += static_cast<size_t>(count);
  }
  text.resize(done);
  return text;
}

}  // namespace fastgen::io
