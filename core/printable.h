#pragma once
// Text of other hands, made fit for one line of a terminal.
#include <string>
#include <string_view>

namespace tforge {

/// The text with its control characters written as "\x1b": one line, and nothing that a terminal obeys. Names and
/// values from files end up in messages. What is printable already comes back as it is.
std::string printable(std::string_view text);

}  // namespace tforge
