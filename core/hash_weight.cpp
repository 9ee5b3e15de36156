#include "core/hash_weight.h"

#include "core/errors.h"

namespace tforge {

std::string_view name_of(HashWeight weight) {
  switch (weight) {
    case HashWeight::p: return "p";
    case HashWeight::l1_times_p: return "l1_times_p";
  }
  return "?";
}

HashWeight hash_weight_from_name(std::string_view name) {
  for (const HashWeight weight : {HashWeight::p, HashWeight::l1_times_p}) {
    if (name == name_of(weight)) return weight;
  }
  throw ConfigError("'{}' is no weight of a hash; there are p and l1_times_p", name);
}

}  // namespace tforge
