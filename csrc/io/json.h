// A strict JSON reader (RFC 8259) for configurations and safetensors headers, which may be hostile:
// depth and number of values are bounded, duplicate keys and invalid UTF-8 are refused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace fastgen::io {

class Json {
 public:
  enum class Type { kNull, kBool, kInteger, kDouble, kString, kArray, kObject };
  using Member = std::pair<std::string, Json>;

  static constexpr int kMaxDepth = 64;
  // Far above any real header (a tensor takes about eight), small enough to bound memory.
  static constexpr size_t kMaxValues = size_t{1} << 20;

  Json() = default;
  explicit Json(bool value) : type_(Type::kBool), integer_(value) {}
  explicit Json(int64_t value) : type_(Type::kInteger), integer_(value) {}
  explicit Json(double value) : type_(Type::kDouble), double_(value) {}
  explicit Json(std::string value) : type_(Type::kString), string_(std::move(value)) {}
  explicit Json(std::vector<Json> value) : type_(Type::kArray), array_(std::move(value)) {}
  explicit Json(std::vector<Member> value) : type_(Type::kObject), members_(std::move(value)) {}

  Type type() const { return type_; }
  bool is_null() const { return type_ == Type::kNull; }
  bool is_bool() const { return type_ == Type::kBool; }
  bool is_integer() const {
    return type_ == Type::kInteger;
  }  // fits int64, no fraction, no exponent
  bool is_number() const { return is_integer() || type_ == Type::kDouble; }
  bool is_string() const { return type_ == Type::kString; }
  bool is_array() const { return type_ == Type::kArray; }
  bool is_object() const { return type_ == Type::kObject; }

  // Only for a value of that type.
  bool boolean() const { return integer_ != 0; }
  int64_t integer() const { return integer_; }
  double number() const { return is_integer() ? static_cast<double>(integer_) : double_; }
  const std::string& string() const { return string_; }
  const std::vector<Json>& array() const { return array_; }
  const std::vector<Member>& members() const { return members_; }  // in the file's order

  // The member `key` of an object, or null if there is none.
  const Json* Find(const std::string& key) const;

  // The value in a few words, for messages: "3", "'relu'", "a list".
  std::string Describe() const;

 private:
  Type type_ = Type::kNull;
  int64_t integer_ = 0;
  double double_ = 0.0;
  std::string string_;
  std::vector<Json> array_;
  std::vector<Member> members_;
};

// Parses one document that fills [text, text + size). Throws base::Error(kBadFile) that begins with
// `where` and names the byte offset.
Json ParseJson(const char* text, size_t size, const std::string& where);

}  // namespace fastgen::io
