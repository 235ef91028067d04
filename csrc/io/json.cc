#include "io/json.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <locale>
#include <sstream>

#include "base/error.h"
#include "base/utf8.h"

namespace fastgen::io {

namespace {

class Parser {
 public:
  Parser(const char* text, size_t size, const std::string& where)
      : text_(text), size_(size), where_(where) {}

  Json Document() {
    SkipSpace();
    Json value = Value(0);
    SkipSpace();
    if (position_ != size_) Fail("there is text after the end of the JSON document");
    return value;
  }

 private:
  [[noreturn]] void Fail(const std::string& what) const {
    throw base::Error(FASTGEN_BAD_FILE, where_ + ": is not valid JSON: " + what + " at byte " +
                                            std::to_string(position_));
  }

  bool AtEnd() const { return position_ == size_; }
  // The next byte; '\0' at the end, which no rule of the grammar accepts.
  char Peek() const { return AtEnd() ? '\0' : text_[position_]; }

  void SkipSpace() {
    while (!AtEnd()) {
      const char c = text_[position_];
      if (c != ' ' && c != '\t' && c != '\n' && c != '\r') return;
      ++position_;
    }
  }

  void Expect(char wanted) {
    if (AtEnd()) Fail(std::string("the JSON text ends where '") + wanted + "' is expected");
    if (text_[position_] != wanted) Fail(std::string("'") + wanted + "' is expected");
    ++position_;
  }

  void ExpectWord(const char* word) {
    const size_t length = std::strlen(word);
    if (size_ - position_ < length || std::memcmp(text_ + position_, word, length) != 0) {
      Fail("a JSON value is expected");
    }
    position_ += length;
  }

  Json Value(int depth) {
    if (depth > Json::kMaxDepth) {
      Fail("JSON is nested deeper than " + std::to_string(Json::kMaxDepth) + " levels");
    }
    if (++num_values_ > Json::kMaxValues) {
      Fail("JSON has more than " + std::to_string(Json::kMaxValues) + " values");
    }
    if (AtEnd()) Fail("the JSON text ends where a value is expected");
    switch (text_[position_]) {
      case '{': return Object(depth);
      case '[': return Array(depth);
      case '"': return Json(String());
      case 't': ExpectWord("true"); return Json(true);
      case 'f': ExpectWord("false"); return Json(false);
      case 'n': ExpectWord("null"); return Json();
      case 'N':
      case 'I': Fail("NaN and Infinity are not JSON numbers");
      default: return Number();
    }
  }

  Json Object(int depth) {
    std::vector<Json::Member> members;
    Expect('{');
    SkipSpace();
    if (Peek() != '}') {
      while (true) {
        SkipSpace();
        if (Peek() != '"') Fail("a key in double quotes is expected");
        std::string key = String();
        SkipSpace();
        Expect(':');
        SkipSpace();
        members.emplace_back(std::move(key), Value(depth + 1));
        SkipSpace();
        if (Peek() != ',') break;
        ++position_;
      }
    }
    Expect('}');
    RefuseDuplicates(members);
    return Json(std::move(members));
  }

  void RefuseDuplicates(const std::vector<Json::Member>& members) const {
    // Sorted rather than hashed: no input makes it slow.
    std::vector<const std::string*> keys;
    keys.reserve(members.size());
    for (const Json::Member& member : members) keys.push_back(&member.first);
    std::sort(keys.begin(), keys.end(),
              [](const std::string* a, const std::string* b) { return *a < *b; });
    for (size_t i = 1; i < keys.size(); ++i) {
      if (*keys[i] == *keys[i - 1]) {
        Fail("the key " + base::Quote(*keys[i]) + " is given twice in the JSON object that ends");
      }
    }
  }

  Json Array(int depth) {
    std::vector<Json> values;
    Expect('[');
    SkipSpace();
    if (Peek() != ']') {
      while (true) {
        SkipSpace();
        values.push_back(Value(depth + 1));
        SkipSpace();
        if (Peek() != ',') break;
        ++position_;
      }
    }
    Expect(']');
    return Json(std::move(values));
  }

  static bool IsDigit(char c) { return c >= '0' && c <= '9'; }

  void Digits() {
    if (!IsDigit(Peek())) Fail("a digit is expected");
    while (IsDigit(Peek())) ++position_;
  }

  Json Number() {
    const size_t begin = position_;
    if (Peek() == '-') ++position_;
    if (Peek() == 'N' || Peek() == 'I') Fail("NaN and Infinity are not JSON numbers");
    if (!IsDigit(Peek())) Fail("a JSON value is expected");
    if (Peek() == '0') {
      ++position_;
      if (IsDigit(Peek())) Fail("a JSON number may not begin with 0");
    } else {
      Digits();
    }
    bool is_integer = true;
    if (Peek() == '.') {
      is_integer = false;
      ++position_;
      Digits();
    }
    if (Peek() == 'e' || Peek() == 'E') {
      is_integer = false;
      ++position_;
      if (Peek() == '+' || Peek() == '-') ++position_;
      Digits();
    }
    if (is_integer) {
      int64_t value = 0;
      if (ToInteger(text_ + begin, text_ + position_, &value)) return Json(value);
    }
    // A stream with the classic locale: strtod() would follow the host program's locale.
    std::istringstream stream(std::string(text_ + begin, position_ - begin));
    stream.imbue(std::locale::classic());
    double value = 0.0;
    if (!(stream >> value) || !std::isfinite(value)) {
      position_ = begin;
      Fail("a number is out of range");
    }
    return Json(value);
  }

  // False if the digits, perhaps after a minus, do not fit int64.
  static bool ToInteger(const char* begin, const char* end, int64_t* value) {
    const bool negative = *begin == '-';
    int64_t sum = 0;  // kept negative, whose range is the larger one
    for (const char* c = begin + negative; c != end; ++c) {
      if (__builtin_mul_overflow(sum, int64_t{10}, &sum)) return false;
      if (__builtin_sub_overflow(sum, static_cast<int64_t>(*c - '0'), &sum)) return false;
    }
    if (!negative && sum == std::numeric_limits<int64_t>::min()) return false;
    *value = negative ? sum : -sum;
    return true;
  }

  uint32_t Hex4() {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = Peek();
      uint32_t digit;
      if (IsDigit(c)) {
        digit = static_cast<uint32_t>(c - '0');
      } else if (c >= 'a' && c <= 'f') {
        digit = static_cast<uint32_t>(c - 'a' + 10);
      } else if (c >= 'A' && c <= 'F') {
        digit = static_cast<uint32_t>(c - 'A' + 10);
      } else {
        Fail("four hexadecimal digits are expected after \\u");
      }
      value = value * 16 + digit;
      ++position_;
    }
    return value;
  }

  void Escape(std::string* out) {
    const char c = Peek();
    ++position_;
    switch (c) {
      case '"':
      case '\\':
      case '/': out->push_back(c); return;
      case 'b': out->push_back('\b'); return;
      case 'f': out->push_back('\f'); return;
      case 'n': out->push_back('\n'); return;
      case 'r': out->push_back('\r'); return;
      case 't': out->push_back('\t'); return;
      case 'u': {
        uint32_t code = Hex4();
        if (code >= 0xdc00 && code <= 0xdfff) Fail("a low surrogate without its high surrogate");
        if (code >= 0xd800 && code <= 0xdbff) {
          if (Peek() != '\\') Fail("a high surrogate without its low surrogate");
          ++position_;
          if (Peek() != 'u') Fail("a high surrogate without its low surrogate");
          ++position_;
          const uint32_t low = Hex4();
          if (low < 0xdc00 || low > 0xdfff) Fail("a high surrogate without its low surrogate");
          code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        }
        base::AppendUtf8(code, out);
        return;
      }
      default: --position_; Fail("an unknown escape sequence");
    }
  }

  // Copies one character of more than a byte, refusing overlong forms, surrogates and the like.
  void MultiByte(std::string* out) {
    const base::Utf8Unit unit = base::ReadUtf8(text_ + position_, text_ + size_);
    if (unit.state != base::Utf8State::kValid) Fail("a string is not valid UTF-8");
    out->append(text_ + position_, unit.size);
    position_ += unit.size;
  }

  std::string String() {
    Expect('"');
    std::string out;
    while (true) {
      if (AtEnd()) Fail("the JSON text ends inside a string");
      const unsigned char c = static_cast<unsigned char>(text_[position_]);
      if (c == '"') {
        ++position_;
        return out;
      }
      if (c < 0x20) Fail("a control character inside a string");
      if (c == '\\') {
        ++position_;
        if (AtEnd()) Fail("the JSON text ends inside a string");
        Escape(&out);
      } else if (c < 0x80) {
        out.push_back(static_cast<char>(c));
        ++position_;
      } else {
        MultiByte(&out);
      }
    }
  }

  const char* text_;
  size_t size_;
  const std::string& where_;
  size_t position_ = 0;
  size_t num_values_ = 0;
};

}  // namespace

const Json* Json::Find(const std::string& key) const {
  for (const Member& member : members_) {
    if (member.first == key) return &member.second;
  }
  return nullptr;
}

std::string Json::Describe() const {
  switch (type_) {
    case Type::kNull: return "null";
    case Type::kBool: return boolean() ? "true" : "false";
    case Type::kInteger: return std::to_string(integer_);
    case Type::kDouble: {
      std::ostringstream stream;
      stream.imbue(std::locale::classic());
      stream << double_;
      return stream.str();
    }
    case Type::kString: return base::Quote(string_);
    case Type::kArray: return "a list";
    case Type::kObject: break;
  }
  return "an object";
}

Json ParseJson(const char* text, size_t size, const std::string& where) {
  return Parser(text, size, where).Document();
}

}  // namespace fastgen::io
