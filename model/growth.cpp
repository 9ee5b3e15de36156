#include "model/growth.h"

#include <algorithm>

#include "core/errors.h"
#include "core/nearest.h"
#include "kernels/elementwise.h"

namespace tforge {

void set_wanted(const GrowthRequest& request, std::string_view kind, std::vector<GrowthGroup>& groups) {
  std::vector<std::string> names;
  std::string list;
  for (GrowthGroup& group : groups) {
    names.push_back(group.name);
    list += (list.empty() ? "" : ", ") + group.name;
    group.after = group.before;
  }
  bool grows = false;
  for (const auto& [name, count] : request.counts) {
    const auto group = std::ranges::find(groups, name, &GrowthGroup::name);
    if (group == groups.end()) {
      throw UsageError("'{}' is nothing that a {} grows by; there is {}{}", name, kind, list,
                       did_you_mean(name, names));
    }
    if (count < group->before) {
      throw UsageError("{} has {} {} {} and cannot shrink to {}; ask for more than {}", request.model, group->before,
                       name, group->unit, count, group->before);
    }
    group->after = count;
    grows = grows || count > group->before;
  }
  if (!grows) throw UsageError("nothing grows: ask for more than {} has of at least one of {}", request.model, list);
}

void Growth::fill_moment(Moment, const ParameterSpec&, ConstTensorView old, std::int64_t, TensorView out) const {
  Stream stream;
  kernels::add_to(stream, old, GradMode::overwrite, out);
}

}  // namespace tforge
