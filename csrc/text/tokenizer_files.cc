#include "text/tokenizer_files.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <utility>

#include "base/error.h"
#include "base/utf8.h"
#include "io/export.h"
#include "io/json.h"
#include "io/mapped_file.h"

namespace fastgen::text {
namespace {

using io::Json;

// Several times the size of any real one.
constexpr uint64_t kMaxFileBytes = uint64_t{64} << 20;
constexpr size_t kMaxMerges = size_t{1} << 20;

// The special token of every GPT-2; a vocab.json does not mark it.
constexpr char kEndOfText[] = "<|endoftext|>";

[[noreturn]] void Bad(const std::string& path, const std::string& what) {
  throw base::Error(FASTGEN_BAD_FILE, path + ": " + what);
}

bool Exists(const std::string& path) {
  struct stat status;
  // Anything but "there is no such file" (a symlink loop, no permission) is for the opening to say.
  return stat(path.c_str(), &status) == 0 || errno != ENOENT;
}

void CheckUtf8(const std::string& line, size_t number, const std::string& path) {
  const char* end = line.data() + line.size();
  for (const char* p = line.data(); p != end;) {
    const base::Utf8Unit unit = base::ReadUtf8(p, end);
    if (unit.state != base::Utf8State::kValid) {
      Bad(path, "line " + std::to_string(number) + ", " + base::Quote(line) + ", is not UTF-8");
    }
    p += unit.size;
  }
}

// Calls use(line, number from 1) for every line, without "\n" or "\r\n". What follows the last line
// break is a line if there is anything.
template <typename Use>
void ForEachLine(const std::string& text, const std::string& path, const Use& use) {
  size_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    size_t end = text.find('\n', begin);
    if (end == std::string::npos) end = text.size();
    const bool carriage_return = end > begin && text[end - 1] == '\r';
    const std::string line = text.substr(begin, end - begin - (carriage_return ? 1 : 0));
    CheckUtf8(line, ++number, path);
    use(line, number);
    begin = end + 1;
  }
}

// ---- tokenizer.json -------------------------------------------------------------------------

// A member that may be missing or null: both are a null pointer.
const Json* Optional(const Json& object, const char* key) {
  const Json* value = object.Find(key);
  return value == nullptr || value->is_null() ? nullptr : value;
}

const Json& Member(const Json& object, const char* key, Json::Type type, const std::string& what,
                   const std::string& path) {
  const Json* value = object.Find(key);
  if (value == nullptr) Bad(path, what + " has no '" + key + "'");
  if (value->type() != type) {
    Bad(path, "'" + std::string(key) + "' of " + what + " is " + value->Describe() +
                  ", which is not what it must be");
  }
  return *value;
}

bool Flag(const Json& object, const char* key, bool missing, const std::string& what,
          const std::string& path) {
  const Json* value = Optional(object, key);
  if (value == nullptr) return missing;
  if (!value->is_bool()) {
    Bad(path, "'" + std::string(key) + "' of " + what + " is " + value->Describe() +
                  ", it must be true or false");
  }
  return value->boolean();
}

// What this library does not do is refused, so that text never silently becomes other tokens.
void Refuse(bool condition, const std::string& path, const std::string& what,
            const std::string& value, const std::string& allowed) {
  if (!condition) return;
  throw base::Error(FASTGEN_UNSUPPORTED,
                    path + ": " + what + " is " + value + ", it must be " + allowed);
}

void RefuseUnlessByteLevel(const Json& document, const char* part, const std::string& path) {
  const Json* value = Optional(document, part);
  const std::string name = "'" + std::string(part) + "'";
  Refuse(value == nullptr, path, name, "missing", "of type ByteLevel");
  if (!value->is_object()) Bad(path, name + " is " + value->Describe() + ", it must be an object");
  const Json& type = Member(*value, "type", Json::Type::kString, name, path);
  Refuse(type.string() != "ByteLevel", path, name, "of type " + base::Quote(type.string()),
         "of type ByteLevel");
  if (std::strcmp(part, "pre_tokenizer") != 0) return;
  Refuse(Flag(*value, "add_prefix_space", true, name, path), path, "'add_prefix_space' of " + name,
         "true", "false");
  Refuse(!Flag(*value, "use_regex", true, name, path), path, "'use_regex' of " + name, "false",
         "true");
}

void RefuseUnlessPlainBpe(const Json& model, const std::string& path) {
  const std::string name = "'model'";
  if (const Json* type = Optional(model, "type")) {
    const bool bpe = type->is_string() && type->string() == "BPE";
    Refuse(!bpe, path, name, "of type " + type->Describe(), "of type BPE");
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const Json* value = Optional(model, key);
    const bool empty = value == nullptr || (value->is_string() && value->string().empty());
    Refuse(!empty, path, "'" + std::string(key) + "' of " + name,
           value == nullptr ? "" : value->Describe(), "empty");
  }
  const Json* dropout = Optional(model, "dropout");
  const bool drops = dropout != nullptr && !(dropout->is_number() && dropout->number() == 0.0);
  Refuse(drops, path, "'dropout' of " + name, drops ? dropout->Describe() : "", "null");
  for (const char* key : {"byte_fallback", "ignore_merges"}) {
    Refuse(Flag(model, key, false, name, path), path, "'" + std::string(key) + "' of " + name,
           "true", "false");
  }
}

std::vector<Token> ToVocabulary(const Json& object, const std::string& path) {
  std::vector<Token> tokens;
  tokens.reserve(object.members().size());
  for (const Json::Member& member : object.members()) {
    const Json& id = member.second;
    if (!id.is_integer() || id.integer() < 0 || id.integer() >= Vocabulary::kMaxTokens) {
      Bad(path, "token " + base::Quote(member.first) + " has id " + id.Describe() +
                    ", it must be an integer from 0 to " +
                    std::to_string(Vocabulary::kMaxTokens - 1));
    }
    tokens.push_back({member.first, static_cast<int32_t>(id.integer())});
  }
  return tokens;
}

MergeTable::Pair SplitMerge(const std::string& text, const std::string& which,
                            const std::string& path) {
  const size_t space = text.find(' ');
  if (space == 0 || space == std::string::npos || space + 1 == text.size() ||
      text.find(' ', space + 1) != std::string::npos) {
    Bad(path, which + " is " + base::Quote(text) + ", it must be two tokens with a space between");
  }
  return {text.substr(0, space), text.substr(space + 1)};
}

// Merges are written "a b" or ["a", "b"].
std::vector<MergeTable::Pair> ToMerges(const Json& array, const std::string& path) {
  std::vector<MergeTable::Pair> merges;
  merges.reserve(array.array().size());
  for (const Json& value : array.array()) {
    const std::string which = "merge " + std::to_string(merges.size() + 1);
    if (value.is_string()) {
      merges.push_back(SplitMerge(value.string(), which, path));
    } else if (value.is_array() && value.array().size() == 2 && value.array()[0].is_string() &&
               value.array()[1].is_string()) {
      merges.emplace_back(value.array()[0].string(), value.array()[1].string());
    } else {
      Bad(path, which + " is " + value.Describe() + ", it must be two tokens");
    }
  }
  return merges;
}

void AddTokens(const Json& array, const std::string& path, TokenizerFiles* files) {
  std::map<std::string, int32_t> ids;  // a tree: no file can make it slow
  for (const Token& token : files->vocabulary) ids.emplace(token.text, token.id);
  for (const Json& value : array.array()) {
    const std::string what = "added token " + std::to_string(files->added.size() + 1);
    if (!value.is_object()) {
      Bad(path, what + " is " + value.Describe() + ", it must be an object");
    }
    AddedToken added;
    added.text = Member(value, "content", Json::Type::kString, what, path).string();
    added.special = Flag(value, "special", false, what, path);
    added.normalized = Flag(value, "normalized", !added.special, what, path);
    for (const char* key : {"single_word", "lstrip", "rstrip"}) {
      Refuse(Flag(value, key, false, what, path), path,
             "'" + std::string(key) + "' of the added token " + base::Quote(added.text), "true",
             "false");
    }
    const Json& id = Member(value, "id", Json::Type::kInteger, what, path);
    if (id.integer() < 0 || id.integer() >= Vocabulary::kMaxTokens) {
      Bad(path, what + " has id " + id.Describe() + ", it must be from 0 to " +
                    std::to_string(Vocabulary::kMaxTokens - 1));
    }
    const int32_t token_id = static_cast<int32_t>(id.integer());
    const auto known = ids.emplace(added.text, token_id);
    if (known.second) {
      files->vocabulary.push_back({added.text, token_id});
    } else if (known.first->second != token_id) {
      Bad(path, "the added token " + base::Quote(added.text) + " has id " + id.Describe() +
                    ", and id " + std::to_string(known.first->second) + " in the vocabulary");
    }
    files->added.push_back(std::move(added));
  }
}

}  // namespace

TokenizerFiles ParseTokenizerJson(const std::string& text, const std::string& path) {
  const Json document = io::ParseJson(text.data(), text.size(), path);
  if (!document.is_object()) Bad(path, "is " + document.Describe() + ", it must be an object");
  const Json& model = Member(document, "model", Json::Type::kObject, "the file", path);
  RefuseUnlessPlainBpe(model, path);
  if (const Json* normalizer = Optional(document, "normalizer")) {
    Refuse(true, path, "'normalizer'", normalizer->Describe(), "null");
  }
  RefuseUnlessByteLevel(document, "pre_tokenizer", path);
  RefuseUnlessByteLevel(document, "decoder", path);
  TokenizerFiles files;
  files.where = path;
  files.merges_where = path;
  files.vocabulary =
      ToVocabulary(Member(model, "vocab", Json::Type::kObject, "'model'", path), path);
  files.merges = ToMerges(Member(model, "merges", Json::Type::kArray, "'model'", path), path);
  if (const Json* added = Optional(document, "added_tokens")) {
    if (!added->is_array()) {
      Bad(path, "'added_tokens' is " + added->Describe() + ", it must be a list");
    }
    AddTokens(*added, path, &files);
  }
  return files;
}

// ---- vocab.json, vocab.txt, merges.txt ------------------------------------------------------

std::vector<Token> ParseVocabJson(const std::string& text, const std::string& path) {
  const Json document = io::ParseJson(text.data(), text.size(), path);
  if (!document.is_object()) Bad(path, "is " + document.Describe() + ", it must be an object");
  return ToVocabulary(document, path);
}

std::vector<Token> ParseVocabText(const std::string& text, const std::string& path) {
  std::vector<Token> tokens;
  ForEachLine(text, path, [&](const std::string& line, size_t number) {
    if (number > static_cast<size_t>(Vocabulary::kMaxTokens)) {
      Bad(path, "has more than " + std::to_string(Vocabulary::kMaxTokens) + " lines");
    }
    // An empty line is an id without a token.
    if (!line.empty()) tokens.push_back({line, static_cast<int32_t>(number - 1)});
  });
  return tokens;
}

std::vector<MergeTable::Pair> ParseMerges(const std::string& text, const std::string& path) {
  std::vector<MergeTable::Pair> merges;
  size_t empty = 0;  // the line that was
  ForEachLine(text, path, [&](const std::string& line, size_t number) {
    if (line.compare(0, std::strlen("#version"), "#version") == 0) return;
    if (line.empty()) {
      if (empty == 0) empty = number;
      return;
    }
    if (empty > 0) Bad(path, "line " + std::to_string(empty) + " is empty, and not the last one");
    if (merges.size() == kMaxMerges) {
      Bad(path, "has more than " + std::to_string(kMaxMerges) + " merges");
    }
    merges.push_back(SplitMerge(line, "line " + std::to_string(number), path));
  });
  return merges;
}

std::vector<std::string> ParseSpecialTokens(const std::string& text, const std::string& path) {
  const Json document = io::ParseJson(text.data(), text.size(), path);
  if (!document.is_object()) Bad(path, "is " + document.Describe() + ", it must be an object");
  std::vector<std::string> tokens;
  for (const char* key : {"bos_token", "eos_token", "pad_token", "unk_token"}) {
    const Json* value = Optional(document, key);
    if (value != nullptr && value->is_object()) value = Optional(*value, "content");
    if (value != nullptr && value->is_string()) tokens.push_back(value->string());
  }
  return tokens;
}

namespace {

// An export says what its special tokens are, and there are no others.
std::vector<std::string> ExportedSpecialTokens(const std::string& directory) {
  io::ExportManifest manifest = io::ReadExportManifest(directory);
  if (!manifest.has_tokenizer) Bad(manifest.path, "tokenizer has no list of special_tokens");
  return std::move(manifest.special_tokens);
}

// A vocabulary does not mark them: what every GPT-2 has, and what the files beside it name.
std::vector<std::string> SpecialTokensBeside(const std::string& directory) {
  std::vector<std::string> special = {kEndOfText};
  for (const char* name : {"special_tokens_map.json", "tokenizer_config.json"}) {
    const std::string path = directory + "/" + name;
    if (!Exists(path)) continue;
    const std::string text = io::ReadTextFile(path, kMaxFileBytes);
    for (std::string& token : ParseSpecialTokens(text, path)) special.push_back(std::move(token));
  }
  return special;
}

}  // namespace

TokenizerFiles ReadTokenizerFiles(const std::string& directory) {
  const auto path_of = [&directory](const char* name) { return directory + "/" + name; };
  const auto read = [](const std::string& path) { return io::ReadTextFile(path, kMaxFileBytes); };
  const std::string whole = path_of("tokenizer.json");
  if (Exists(whole)) return ParseTokenizerJson(read(whole), whole);

  const std::string merges = path_of("merges.txt");
  const std::string json = path_of("vocab.json");
  const std::string lines = path_of("vocab.txt");
  TokenizerFiles files;
  if (Exists(merges) && Exists(json)) {
    files.where = json;
    files.vocabulary = ParseVocabJson(read(json), json);
  } else if (Exists(merges) && Exists(lines)) {
    files.where = lines;
    files.vocabulary = ParseVocabText(read(lines), lines);
  } else {
    throw base::Error(FASTGEN_NOT_FOUND, "directory '" + directory +
                                             "' has no tokenizer, which is tokenizer.json, or "
                                             "vocab.json or vocab.txt with merges.txt");
  }
  files.merges = ParseMerges(read(merges), merges);
  files.merges_where = merges;

  std::vector<std::string> special = files.where == lines && Exists(path_of(io::kManifestName))
                                         ? ExportedSpecialTokens(directory)
                                         : SpecialTokensBeside(directory);
  std::sort(special.begin(), special.end());
  special.erase(std::unique(special.begin(), special.end()), special.end());
  // Only those of the vocabulary: others would have ids that the model does not know.
  for (const Token& token : files.vocabulary) {
    if (!std::binary_search(special.begin(), special.end(), token.text)) continue;
    AddedToken added;
    added.text = token.text;
    files.added.push_back(std::move(added));
  }
  return files;
}

}  // namespace fastgen::text
