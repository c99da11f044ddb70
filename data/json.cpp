// json.cpp - JSON values as texts, for poem_files.h. The only file of prepare_data that needs a library, and
// only where poems come as JSON.
#include "data/poem_files.h"

#if __has_include(<nlohmann/json.hpp>)
#include <nlohmann/json.hpp>

namespace json {

bool available() { return true; }

namespace {
using Value = nlohmann::ordered_json;

// A list's items, with ITEM between them. Within an inner list, a TAB is between the hemistichs.
std::string list_text(const Value& list) {
    std::string s(1, LIST);
    for (size_t i = 0; i < list.size(); i++) {
        if (i) s += ITEM;
        const Value& item = list[i];
        if (!item.is_array()) {
            s += item.is_string() ? item.get<std::string>() : item.is_null() ? "" : item.dump();
            continue;
        }
        for (size_t k = 0; k < item.size(); k++)
            s += (k ? "\t" : "") + (item[k].is_string() ? item[k].get<std::string>() : item[k].dump());
    }
    return s;
}
std::string text_of(const Value& v) {
    return v.is_string()  ? v.get<std::string>()
           : v.is_null()  ? std::string()
           : v.is_array() ? list_text(v)
                          : v.dump();
}
}  // namespace

std::string members(std::string_view value, std::vector<std::pair<std::string, std::string>>* found) {
    found->clear();
    // Nested deeper, the parser's own recursion could exhaust the stack.
    size_t depth = 0, deepest = 0;
    for (char c : value) {
        if (c == '{' || c == '[') deepest = std::max(deepest, ++depth);
        if ((c == '}' || c == ']') && depth) depth--;
    }
    if (deepest > 1000) return "is nested more than 1,000 levels deep";
    Value v = Value::parse(value.begin(), value.end(), nullptr, false);
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
