#include "base/utf8.h"

namespace fastgen::base {

Utf8Unit ReadUtf8(const char* begin, const char* end) {
  const auto byte = [begin](size_t i) { return static_cast<unsigned char>(begin[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {Utf8State::kValid, lead, 1};
  size_t length;
  uint32_t code;
  // Only the second byte has a range of its own: it excludes overlong forms and surrogates.
  unsigned char low = 0x80;
  unsigned char high = 0xbf;
  if (lead >= 0xc2 && lead <= 0xdf) {
    length = 2, code = lead & 0x1fu;
  } else if (lead >= 0xe0 && lead <= 0xef) {
    length = 3, code = lead & 0x0fu;
    if (lead == 0xe0) low = 0xa0;
    if (lead == 0xed) high = 0x9f;
  } else if (lead >= 0xf0 && lead <= 0xf4) {
    length = 4, code = lead & 0x07u;
    if (lead == 0xf0) low = 0x90;
    if (lead == 0xf4) high = 0x8f;
  } else {
    return {Utf8State::kInvalid, 0, 1};
  }
  const size_t available = static_cast<size_t>(end - begin);
  for (size_t i = 1; i < length; ++i) {
    if (i == available) return {Utf8State::kCut, 0, i};
    if (byte(i) < low || byte(i) > high) return {Utf8State::kInvalid, 0, i};
    code = (code << 6) | (byte(i) & 0x3fu);
    low = 0x80, high = 0xbf;
  }
  return {Utf8State::kValid, code, length};
}

void AppendUtf8(uint32_t code, std::string* out) {
  if (code < 0x80) {
    out->push_back(static_cast<char>(code));
    return;
  }
  int tail = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  static const uint32_t kLead[] = {0, 0xc0, 0xe0, 0xf0};
  out->push_back(static_cast<char>(kLead[tail] | (code >> (6 * tail))));
  while (tail-- > 0) out->push_back(static_cast<char>(0x80 | ((code >> (6 * tail)) & 0x3f)));
}

size_t AppendLossy(const char* begin, const char* end, bool hold_cut, std::string* out) {
  const char* p = begin;
  while (p != end) {
    const Utf8Unit unit = ReadUtf8(p, end);
    if (unit.state == Utf8State::kCut && hold_cut) break;
    if (unit.state == Utf8State::kValid) {
      out->append(p, unit.size);
    } else {
      AppendUtf8(0xfffd, out);
    }
    p += unit.size;
  }
  return static_cast<size_t>(p - begin);
}

}  // namespace fastgen::base
