// Where a mistake is and how it is told.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <source_location>
#include <string>

namespace device {

using Where = std::source_location;

namespace host {

inline std::string format(const char* text, ...) {
  char line[1024];
  va_list values;
  va_start(values, text);
  std::vsnprintf(line, sizeof(line), text, values);
  va_end(values);
  return line;
}

// "softmax.cu:41"
inline std::string place(const Where& at) {
  const std::string path = at.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(at.line());
}

inline bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && !std::strcmp(a.file_name(), b.file_name());
}

}  // namespace host
}  // namespace device
