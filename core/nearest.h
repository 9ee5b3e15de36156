#pragma once
// The nearest valid name to one that was misspelt, for error messages.
#include <span>
#include <string>
#include <string_view>

namespace tforge {

/// The candidate with the fewest insertions, deletions, replacements and swaps of neighbours away from `name`
/// (optimal string alignment distance), or "" when even that one is too far off to be meant (more than a third of
/// the longer name's letters, but two are always allowed).
std::string nearest(std::string_view name, std::span<const std::string> candidates);

/// "; did you mean `x`?", or "" when nothing is near.
std::string did_you_mean(std::string_view name, std::span<const std::string> candidates);

}  // namespace tforge
