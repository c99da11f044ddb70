// json.cpp - JSON values as texts, for poem_files.h. The only file of prepare_data that needs a library, and
// only where poems come as JSON.
#include "data/poem_files.h"

#if __has_include(<nlohmann/json.hpp>)
#include <nlohmann/json.hpp>

namespace json {

bool available() { return true; }

namespace {
using Value = nlohmann::ordered_json;

// A text, number or truth value; null as an empty text.
std::string plain(const Value& v) {
    return v.is_string() ? v.get<std::string>() : v.is_null() ? std::string() : v.dump();
}
// A list's items, with ITEM between them. An inner list, or object, is a verse, with a TAB between its
// hemistichs. Deeper ones are written as JSON, after NOT_A_POEM.
std::string text_of(const Value& v) {
    if (v.is_object()) return NOT_A_POEM + v.dump(-1, ' ', false, Value::error_handler_t::replace);
    if (!v.is_array()) return plain(v);
    std::string s(1, LIST);
    for (size_t i = 0; i < v.size(); i++) {
        if (i) s += ITEM;
        if (!v[i].is_structured()) {
            s += plain(v[i]);
            continue;
        }
        bool first = true;
        for (const Value& part : v[i]) {
            if (part.is_structured())
                return NOT_A_POEM + v.dump(-1, ' ', false, Value::error_handler_t::replace);
            s += (first ? "" : "\t") + plain(part);
            first = false;
        }
    }
    return s;
}
// How many lists and objects are within each other. dump() calls itself for each, which takes stack.
size_t depth_of(std::string_view value) {
    size_t depth = 0, deepest = 0;
    bool quoted = false;
    for (size_t i = 0; i < value.size(); i++) {
        const char c = value[i];
        if (quoted && c == '\\') i++;
        else if (c == '"') quoted = !quoted;
        else if (quoted) continue;
        else if (c == '{' || c == '[') deepest = std::max(deepest, ++depth);
        else if ((c == '}' || c == ']') && depth) depth--;
    }
    return deepest;
}
// The value with null for NaN and Infinity, which Python writes although JSON has none.
std::string without_nan(std::string_view value) {
    std::string s;
    bool quoted = false;
    for (size_t i = 0; i < value.size(); i++) {
        if (quoted && value[i] == '\\' && i + 1 < value.size()) s += value[i++];
        else if (value[i] == '"') quoted = !quoted;
        else if (!quoted)
            for (std::string_view word : {"NaN", "-Infinity", "Infinity"})
                if (value.substr(i, word.size()) == word) {
                    s += "null", i += word.size();
                    break;
                }
        if (i < value.size()) s += value[i];
    }
    return s;
}
}  // namespace

std::string members(std::string_view value, std::vector<std::pair<std::string, std::string>>* found) {
    found->clear();
    if (depth_of(value) > 1000) return "is nested more than 1,000 levels deep";
    Value v = Value::parse(value.begin(), value.end(), nullptr, false);
    if (v.is_discarded()) v = Value::parse(without_nan(value), nullptr, false);
    if (v.is_discarded()) return "is not JSON";
    if (v.is_object())
        for (auto& m : v.items()) found->push_back({m.key(), text_of(m.value())});
    else if (v.is_string() || v.is_array()) found->push_back({"", text_of(v)});
    else return "is neither an object nor a text nor a list";
    return "";
}

}  // namespace json

#else
namespace json {
bool available() { return false; }
std::string members(std::string_view, std::vector<std::pair<std::string, std::string>>*) { return "no JSON"; }
}  // namespace json
#endif
