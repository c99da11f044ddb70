// utf8.h - UTF-8: reading, writing, counting and checking characters.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>

#include "lib/io.h"

namespace utf8 {

constexpr uint32_t MAX_CODE_POINT = 0x10FFFF;

// A byte that goes on with a character instead of beginning one.
inline bool is_continuation(char c) { return ((unsigned char)c & 0xC0) == 0x80; }

// How many bytes a character has that begins with this byte; 0 where none does.
inline size_t length_from_lead(char c) {
    unsigned char b = (unsigned char)c;
    return b < 0x80 ? 1 : b < 0xC2 ? 0 : b < 0xE0 ? 2 : b < 0xF0 ? 3 : b < 0xF5 ? 4 : 0;
}

// decode() for a character of three or four bytes, or one that is not valid
inline size_t decode_long(std::string_view s, size_t i, uint32_t* code_point) {
    size_t n = length_from_lead(s[i]);
    if (n < 3 || n > s.size() - i) return 0;
    uint32_t c = (unsigned char)s[i] & (0x7Fu >> n);
    for (size_t k = 1; k < n; k++) {
        if (!is_continuation(s[i + k])) return 0;
        c = c << 6 | ((unsigned char)s[i + k] & 0x3Fu);
    }
    if (c < (n == 3 ? 0x800u : 0x10000u) || (c >= 0xD800 && c <= 0xDFFF) || c > MAX_CODE_POINT) return 0;
    *code_point = c;
    return n;
}
// Reads the character that begins at s[i], i < s.size(). Returns its length in bytes, or 0 where the bytes
// are not valid: overlong forms, surrogates, values above U+10FFFF, stray or missing continuation bytes.
__attribute__((always_inline)) inline size_t decode(std::string_view s, size_t i, uint32_t* code_point) {
    const unsigned char b = (unsigned char)s[i];
    if (b < 0x80) return *code_point = b, 1;
    if (b >= 0xC2 && b < 0xE0 && i + 1 < s.size() && is_continuation(s[i + 1]))
        return *code_point = (b & 0x1Fu) << 6 | ((unsigned char)s[i + 1] & 0x3Fu), 2;
    return decode_long(s, i, code_point);
}

// Writes a code point, which must be a valid one, to the 1 to 4 bytes at `to`; returns how many.
inline size_t write(char* to, uint32_t c) {
    if (c < 0x80) return to[0] = (char)c, 1;
    if (c < 0x800) return to[0] = (char)(0xC0 | c >> 6), to[1] = (char)(0x80 | (c & 0x3F)), 2;
    const size_t n = c < 0x10000 ? 3 : 4;
    to[0] = (char)((n == 3 ? 0xE0 : 0xF0) | c >> (6 * (n - 1)));
    for (size_t k = 1; k < n; k++) to[k] = (char)(0x80 | (c >> (6 * (n - 1 - k)) & 0x3F));
    return n;
}
// Appends a code point, which must be a valid one.
inline void append(std::string& out, uint32_t c) {
    char bytes[4];
    out.append(bytes, write(bytes, c));
}

// How many characters begin in s (bytes that are not continuation bytes).
inline size_t count(std::string_view s) {
    size_t n = 0;
    for (char c : s) n += !is_continuation(c);
    return n;
}

// Offset of the first byte that is not valid UTF-8; VALID where all are.
constexpr size_t VALID = std::string_view::npos;
inline size_t find_invalid(std::string_view s) {
    uint32_t c;
    for (size_t i = 0; i < s.size();) {
        size_t n = decode(s, i, &c);
        if (n == 0) return i;
        i += n;
    }
    return VALID;
}

// How many bytes of s a stream may print now: all but a character at the end whose last bytes are still to
// come.
inline size_t printable_prefix(std::string_view s) {
    for (size_t back = 1; back <= 3 && back <= s.size(); back++) {
        char c = s[s.size() - back];
        if (is_continuation(c)) continue;
        return length_from_lead(c) > back ? s.size() - back : s.size();
    }
    return s.size();
}

// A code point for an error message: 'ب' U+0628, or U+000A alone where printing it would garble the line.
inline std::string name(uint32_t c) {
    bool invisible = c < 0x20 || (c >= 0x7F && c < 0xA0) || c == 0x061C || (c >= 0x200B && c <= 0x200F) ||
                     (c >= 0x2028 && c <= 0x202E) || (c >= 0x2060 && c <= 0x206F) || c == 0xFEFF;
    std::string quoted;
    if (!invisible) append(quoted = "'", c), quoted += "' ";
    return quoted + strf("U+%04X", c);
}

// A text for an error message: 'ab', in one line, with \xNN for the bytes that would garble it; a long one is
// cut.
inline std::string quote(std::string_view s, size_t most = 60) {
    std::string quoted = "'";
    size_t i = 0;
    while (i < s.size() && i < most) {
        uint32_t c;
        size_t n = decode(s, i, &c);
        bool visible = n && name(c)[0] == '\'';
        n = std::max<size_t>(n, 1);
        if (visible) quoted += s.substr(i, n);
        else
            for (size_t k = i; k < i + n; k++) quoted += strf("\\x%02X", (unsigned)(unsigned char)s[k]);
        i += n;
    }
    return quoted + (i < s.size() ? "...'" : "'");
}

// Calls f(code_point, byte_offset) for every character of s; the first invalid byte is an Error.
template <class F>
void for_each(std::string_view s, F f) {
    uint32_t c;
    for (size_t i = 0; i < s.size();) {
        size_t n = decode(s, i, &c);
        if (n == 0) fail("invalid UTF-8 at byte %zu (0x%02X)", i, (unsigned)(unsigned char)s[i]);
        f(c, i);
        i += n;
    }
}

}  // namespace utf8
