#pragma once
// The targets and their seeds, as targets.cpp lists them.
#include "fuzz/targets.h"

namespace tforge::fuzz {

void config(Input input);
void documents(Input input);
void tokenizer(Input input);
void token_dataset(Input input);
void published_file(Input input);
void manifest(Input input);
void checkpoint(Input input);

std::vector<std::string> config_seeds();
std::vector<std::string> documents_seeds();
std::vector<std::string> tokenizer_seeds();
std::vector<std::string> token_dataset_seeds();
std::vector<std::string> published_file_seeds();
std::vector<std::string> manifest_seeds();
std::vector<std::string> checkpoint_seeds();

}  // namespace tforge::fuzz
