"""Bad input, resources that run out, damage: one clear line and the right exit code."""

import json
import os
import shutil
import unittest
import unittest.mock

import h5py

from support import CHAPTER, JOBS, JobTest, SmallDisk, names_in


class Configuration(JobTest):
    """Nothing of this gets as far as a model: no training is needed."""

    def train_fails(self, message, *settings, code=2, ranks=0, more=()):
        options = ["--config", "tiny.toml"]
        for setting in settings:
            options += ["--set", setting]
        before = names_in(self.folder)
        self.fails(code, message, "tf_train", *options, *more, ranks=ranks)
        self.assertEqual(names_in(self.folder), before)

    def file_fails(self, message, old, new):
        config = self.read("tiny.toml").decode()
        self.assertEqual(config.count(old), 1)
        self.write("bad.toml", config.replace(old, new))
        self.fails(2, message, "tf_train", "--config", "bad.toml")

    def test_missing_files(self):
        missing = "cannot be opened: No such file or directory"
        self.fails(2, "none.toml: cannot be read: No such file or directory", "tf_train", "--config", "none.toml")
        self.fails(2, ".: cannot be read: Is a directory", "tf_train", "--config", ".")
        self.train_fails(f"none.h5: {missing}", "data.path=none.h5")
        self.train_fails(f"none.h5: {missing}", more=["--init", "none.h5"])
        self.train_fails(f"none.h5: {missing}", "run.resume=none.h5")
        self.fails(2, f"none.h5: {missing}", "tf_eval", "--checkpoint", "none.h5", "--data", "data.h5")
        self.fails(2, f"none.h5: {missing}", "tf_expand", "--checkpoint", "none.h5", "--output", "o.h5", "--tokens", "ffn=48")
        self.fails(2, f"none.h5: {missing}", "tf_generate", "--checkpoint", "none.h5")
        self.fails(2, f"none.h5: {missing}", "tf_inspect", "none.h5")
        self.fails(2, "cannot read none.txt: No such file or directory", "tf_prepare", "none.txt", "--output", "o.h5")

    def test_command_line(self):
        hint = " (tf_train --help lists all)"
        self.fails(2, "unknown option --confg; did you mean `--config`?" + hint, "tf_train", "--confg", "tiny.toml")
        self.fails(2, "--config is missing" + hint, "tf_train")
        self.fails(2, "the required argument for option '--config' is missing" + hint, "tf_train", "--config")
        self.fails(2, "a word that belongs to no option was given" + hint, "tf_train", "tiny.toml")
        self.fails(2, "--config was given 2 times; give it once", "tf_train", "--config", "a", "--config", "b")
        self.fails(2, "--batch ten: want an integer", "tf_eval", "--checkpoint", "a", "--data", "b", "--batch", "ten")
        for job in JOBS:
            self.fails(2, f"unknown option --bogus# ({job} --help lists all)", job, "--bogus")

    def test_command_line_on_several_ranks_is_reported_once(self):
        self.fails(2, "--config is missing (tf_train --help lists all)", "tf_train", ranks=3)

    def test_keys_of_the_file(self):
        self.file_fails("bad.toml:16:1: unknown key train.bacth; did you mean `train.batch`?", "batch = 4", "bacth = 4")
        self.file_fails("bad.toml:16:1: unknown key train.max_seq; did you mean `model.max_seq`?", "batch = 4", "max_seq = 4")
        self.file_fails("bad.toml:14:1: unknown key dta.path; did you mean `data.path`?", "[data]\npath", "[dta]\npath")
        self.file_fails("bad.toml:4:7: model.dim is a string, want an integer", "dim = 32", 'dim = "32"')
        self.file_fails("bad.toml:18:6: train.lr is a boolean, want a number", "lr = 3e-3", "lr = true")
        self.file_fails("bad.toml:18:6: train.lr = -0.003: want more than 0", "lr = 3e-3", "lr = -3e-3")
        self.file_fails('bad.toml:2:8: model.kind = "tokenfomer": there is "tokenformer", "transformer", "memoryformer"; did you mean `tokenformer`?', "tokenformer", "tokenfomer")
        self.file_fails("bad.toml:5:7: #cannot redefine existing integer 'dim'", "dim = 32", "dim = 32\ndim = 33")
        self.file_fails("bad.toml:4:7: #expected value#", "dim = 32", "dim = ")
        self.file_fails("bad.toml: data.path is missing: token dataset written by tf_prepare", 'path = "data.h5"', "")

    def test_nothing_that_a_terminal_obeys_is_printed(self):
        self.file_fails(r"bad.toml:16:1: unknown key train.a\x1b[2J\x0ab", "batch = 4", r'"a\u001b[2J\nb" = 4')
        self.file_fails(r'bad.toml:23:7: run.dir = "r\u001Bn": want a text that is not empty, without control characters',
                        'dir = "run"', r'dir = "r\u001bn"')
        self.fails(2, r"no\x1b[2Jne.toml: cannot be read: No such file or directory", "tf_train", "--config", "no\x1b[2Jne.toml")

    def test_overrides(self):
        self.train_fails("--set train.lrr: unknown key train.lrr; did you mean `train.lr`?", "train.lrr=1")
        self.train_fails("--set lr: unknown key lr; did you mean `train.lr`?", "lr=1")
        self.train_fails("--set train.lr=abc: train.lr is a string, want a number", "train.lr=abc")
        self.train_fails("--set train.steps=1.5: train.steps is a floating-point number, want an integer", "train.steps=1.5")
        self.train_fails("--set nonsense: want KEY=VALUE, for example --set train.lr=3e-4", "nonsense")
        self.train_fails("--set model: model is a section; its keys are given below [model]", "model=3")
        self.train_fails('--set model.norm=softmx: model.norm = "softmx": want one of "l2_norm_gelu", "gelu_l2_norm", '
                         '"softmax"; did you mean `softmax`?', "model.norm=softmx")

    def test_models_that_cannot_be(self):
        self.train_fails("--set model.heads: model.heads = 5 does not divide model.dim = 32; choose a divisor of 32",
                         "model.heads=5")
        self.train_fails("--set model.rotary_fraction: model.rotary_fraction = 0.375 rotates 3 of the 8 dimensions of a head, "
                         "an odd number; rotation pairs dimensions, so choose a fraction that gives an even one",
                         "model.rotary_fraction=0.375")
        self.train_fails("model.vocab = 300, but the dataset data.h5 has a vocabulary of 400; remove the key, or use the "
                         "dataset that the model was made for", "model.vocab=300")
        self.train_fails("--set train.seq: train.seq = 65 is longer than model.max_seq = 64", "train.seq=65")

    def test_layouts_that_cannot_be(self):
        split = "cannot be split over 3 ranks; use at most 2#"
        self.train_fails(f"model.tokens.key: 2 #{split}", "model.tokens.key=2", "parallel.tp=3", ranks=3)
        self.train_fails(f"model.heads: 2 #{split}", "model.heads=2", "parallel.tp=3", ranks=3)
        self.train_fails("train.batch = 2 gives some of 3 data-parallel ranks no sequence; use a batch of at least 3, or "
                         "fewer ranks", "train.batch=2", ranks=3)
        self.train_fails("parallel.dp = 0 and parallel.tp = 3 want a multiple of 3 ranks, the job has 2", "parallel.tp=3",
                         ranks=2)
        self.train_fails("parallel.dp = 2 and parallel.tp = 2 want a multiple of 4 ranks, the job has 3", "parallel.dp=2", "parallel.tp=2",
                         ranks=3)

    def test_a_device_that_is_not_there(self):
        with unittest.mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
            self.train_fails('run.device = "cuda": there is none here: #; use run.device = "cpu", or start where there is one',
                             "run.device=cuda", code=3)

    def test_another_number_of_ranks_than_meant(self):
        start = "Start with `mpirun -n 2 PROGRAM`, or under SLURM with `srun --mpi=pmix -n 2 PROGRAM`"
        for job, options in [("tf_train", ["--config", "tiny.toml"]), ("tf_inspect", ["run"]),
                             ("tf_eval", ["--checkpoint", "a", "--data", "b"])]:
            self.fails(3, "MPI sees 1 ranks, but SLURM_NTASKS says that 2 were started: they would be independent jobs. " + start,
                       job, *options, env={"SLURM_NTASKS": "2"})
            self.fails(3, "2 ranks are expected, MPI sees 1. " + start, job, *options, "--expect-ranks", 2)
        self.train_fails("2 ranks are expected, MPI sees 1. " + start, "run.expect_ranks=2", code=3)
        self.train_fails("3 ranks are expected, MPI sees 2. #", "run.expect_ranks=3", code=3, ranks=2)
        self.assertNotIn("run", names_in(self.folder))

    def test_corpora(self):
        self.write("latin1.txt", b"one\ntwo \xe9t\xe9\n")
        self.write("empty.txt", b"")
        before = names_in(self.folder)
        for message, *options in [
                ("latin1.txt is not UTF-8: ill-formed character at byte offset 8; convert the file first", "latin1.txt"),
                ("the corpus is empty: empty.txt holds no text", "empty.txt"),
                ("the corpus holds 1 document, at least 3 are needed for train, validation and test; give more files or split "
                 "them with --document-start", "kjv.txt"),
                ("the regular expression '[' is malformed: #", "kjv.txt", "--document-start", "["),
                ("a BPE vocabulary of 90000 pieces cannot be trained on # bytes of text: #", "kjv.txt", "--document-start",
                 CHAPTER, "--vocab", 90000)]:
            self.fails(2, message, "tf_prepare", *options, "--output", "o.h5")
        self.fails(2, "data.h5 exists already; --force replaces it", "tf_prepare", "kjv.txt", "--document-start", CHAPTER,
                   "--output", "data.h5")
        self.fails(2, "cannot write none/o.h5: there is no folder none", "tf_prepare", "kjv.txt", "--output", "none/o.h5")
        self.assertEqual(names_in(self.folder), before)

    def test_datasets_that_are_none(self):
        data = self.read("data.h5")
        self.write("cut.h5", data[:5000])
        self.train_fails("cut.h5: the HDF5 file is truncated (5000 bytes on disk); copy it again or make it anew",
                         "data.path=cut.h5")
        self.write("half.h5", data[:len(data) // 2])
        self.train_fails(f"half.h5: the HDF5 file is truncated ({len(data) // 2} bytes on disk); copy it again or make it anew",
                         "data.path=half.h5")
        self.write("text.h5", b"not HDF5\n")
        self.train_fails("text.h5: not an HDF5 file (9 bytes)", "data.path=text.h5")
        with h5py.File(self.path("other.h5"), "w") as file:
            file["x"] = [1, 2, 3]
        self.train_fails("other.h5: an HDF5 file that no writer of TokenForge has made; make it anew", "data.path=other.h5")


class Checkpoints(JobTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.train()
        cls.finish(cls.run_job("tf_prepare", "kjv.txt", "--document-start", CHAPTER, "--tokenizer", "bytes", "--output",
                               "bytes.h5"))

    def setUp(self):
        self.before = names_in(self.folder), names_in(self.path("run"))

    def tearDown(self):
        # Nothing of a job that failed is left.
        self.assertEqual((names_in(self.folder), names_in(self.path("run"))), self.before)

    def test_another_tokenizer(self):
        message = (f"bytes.h5 was made with another tokenizer than {self.checkpoint}; prepare the text again with "
                   f"--tokenizer {self.checkpoint}")
        self.fails(2, message, "tf_eval", "--checkpoint", self.checkpoint, "--data", "bytes.h5")
        self.fails(2, message, "tf_train", "--config", "tiny.toml", "--set", "data.path=bytes.h5")
        self.fails(2, message, "tf_train", "--config", "tiny.toml", "--set", "data.path=bytes.h5", "--set", "run.dir=new",
                   "--init", self.checkpoint)

    def test_resume_with_another_model(self):
        for setting, asked, has in [("model.dim=64", "64", "32"), ("model.tokens.ffn=48", "48", "24"),
                                    ("model.norm=softmax", '"softmax"', '"l2_norm_gelu"')]:
            key = setting.split("=")[0]
            self.fails(2, f"--set {key}: {key} = {asked} contradicts the checkpoint, which has {has}; remove the key, or start a "
                          "new run in another run.dir (tf_expand makes a model larger)",
                       "tf_train", "--config", "tiny.toml", "--set", setting, ranks=2)

    def test_resume_never(self):
        self.fails(2, f'run.dir = "run" holds {self.checkpoint} already, and run.resume is "never"; choose another run.dir or '
                      'run.resume = "auto"', "tf_train", "--config", "tiny.toml", "--set", "run.resume=never")

    def test_evaluation_that_cannot_be(self):
        command = ["tf_eval", "--checkpoint", self.checkpoint, "--data", "data.h5"]
        self.fails(2, "'val' is no split; there are train, validation and test", *command, "--split", "val")
        self.fails(2, "a context of 65 tokens for a model trained on 64; choose at most 64", *command, "--context", 65)
        self.fails(2, "a stride of 65 tokens skips some in a context of 64", *command, "--stride", 65)
        self.fails(2, "a batch of 0 windows: at least 1 is needed", *command, "--batch", 0)
        self.fails(2, "none/x.json: cannot be created: No such file or directory", *command, "--json", "none/x.json")
        self.fails(2, f"{self.checkpoint} is not a token dataset; make one with tf_prepare", "tf_eval", "--checkpoint",
                   self.checkpoint, "--data", self.checkpoint)

    def test_generation_that_cannot_be(self):
        command = ["tf_generate", "--checkpoint", self.checkpoint]
        self.assertEqual(self.fails(2, "temperature -1: want 0 or more", *command, "--temperature", -1).out, "")
        self.fails(2, "top-p 2: want more than 0, at most 1", *command, "--top-p", 2)
        self.fails(2, "samples 0: want 1 or more", *command, "--samples", 0)
        self.fails(2, "generation needs a prompt of at least one token", *command, "--prompt", "")
        self.fails(2, "the prompt has # tokens, the model was trained on 64; shorten the prompt", *command, "--prompt",
                   "And God said, Let there be light: " * 20)

    def test_expansion_that_cannot_be(self):
        command = ["tf_expand", "--checkpoint", self.checkpoint, "--output", "o.h5", "--tokens"]
        self.fails(2, f"{self.checkpoint} has 24 ffn tokens a layer and cannot shrink to 20; ask for more than 24", *command,
                   "key=24,ffn=20")
        self.fails(2, "'fnn' is nothing that a tokenformer grows by; there is query, key, value, proj, ffn; did you mean `ffn`?",
                   *command, "fnn=48")
        self.fails(2, '--tokens "ffn": want NAME=COUNT pairs like query=192,key=192,value=192,proj=192,ffn=768', *command, "ffn")
        self.fails(2, f"nothing grows: ask for more than {self.checkpoint} has of at least one of query, key, value, proj, ffn",
                   *command, "ffn=24")
        self.fails(2, "'zerokey' is no growth rule; there are zero-key, public, random-key-zero-value and mirror", *command,
                   "ffn=48", "--rule", "zerokey")
        self.fails(2, "none/o.h5: cannot be created: No such file or directory", "tf_expand", "--checkpoint", self.checkpoint,
                   "--output", "none/o.h5", "--tokens", "ffn=48")

    def test_expansion_onto_a_checkpoint(self):
        other = "run/step_00000003.h5"
        content = self.read(other)
        self.fails(2, f"{other}: there is a checkpoint of this name already; move it away or choose another folder", "tf_expand",
                   "--checkpoint", self.checkpoint, "--output", other, "--tokens", "ffn=48", ranks=2)
        self.assertEqual(self.read(other), content)

    def check_damage(self, change, message):
        with self.subTest(message):
            os.mkdir(self.path("damaged"))
            try:
                name = "damaged/step_00000006.h5"
                shutil.copy(self.path(self.checkpoint + ".manifest"), self.path(name + ".manifest"))
                self.write(name, change(self.read(self.checkpoint)))
                message = f"{name}: {message}"
                self.fails(4, message, "tf_inspect", name)
                self.fails(4, message + '; no checkpoint of run.dir = "damaged" is whole, and nothing was trained; #', "tf_train",
                           "--config", "tiny.toml", "--set", "run.dir=damaged")
                self.fails(4, "#" + message, "tf_eval", "--checkpoint", name, "--data", "data.h5", ranks=2)
                self.fails(4, message, "tf_expand", "--checkpoint", name, "--output", "o.h5", "--tokens", "ffn=48")
                self.fails(4, message, "tf_generate", "--checkpoint", name)
                listing = self.run_job("tf_inspect", "damaged")
                self.assertEqual(listing.code, 4, listing)
                self.assertTrue(listing.out.startswith(f"damaged  {name}: "), listing)
                self.assertEqual(names_in(self.path("damaged")), ["step_00000006.h5", "step_00000006.h5.manifest"])
            finally:
                shutil.rmtree(self.path("damaged"))

    def test_damaged_checkpoints(self):
        size = os.path.getsize(self.path(self.checkpoint))
        self.check_damage(lambda data: data[:100000], f"damaged: 100000 bytes, its manifest says {size}")
        with h5py.File(self.path(self.checkpoint), "r") as file:
            tensor = "model/layers.0.attention.key.values"
            at = file[tensor].id.get_offset() + 32 * 4 * 5 + 17  # in row 5

        def flip(data):
            return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]

        self.check_damage(flip, f"damaged between bytes #: {tensor} row 5")

    def test_a_checkpoint_without_manifest(self):
        shutil.copy(self.path(self.checkpoint), self.path("bare.h5"))
        self.fails(4, "bare.h5: no readable manifest beside it, so its save did not finish or the manifest was lost #", "tf_inspect",
                   "bare.h5")
        os.remove(self.path("bare.h5"))


class FullDisk(JobTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.train()

    FULL = "#the disk is full; free space or write elsewhere"

    def test_prepare(self):
        disk = SmallDisk(self, "64k")
        self.fails(3, self.FULL, "tf_prepare", "kjv.txt", "--document-start", CHAPTER, "--vocab", 400, "--output",
                   f"{disk.folder}/d.h5")
        self.assertEqual(names_in(disk.folder), [])

    def test_expand(self):
        for ranks in [1, 2]:
            disk = SmallDisk(self, "256k")
            self.fails(3, self.FULL, "tf_expand", "--checkpoint", self.checkpoint, "--output", f"{disk.folder}/g.h5", "--tokens",
                       "ffn=480", ranks=ranks)
            self.assertEqual(names_in(disk.folder), [])

    def train_until_given_up(self, disk, step):
        self.fails(3, f"step {step}, the last of the run, could not be saved in 10 tries: {self.FULL}", "tf_train", "--config",
                   "tiny.toml", "--set", f"run.dir={disk.folder}/run", "--set", "run.save_retry_s=0.01", ranks=2)

    def test_first_save(self):
        disk = SmallDisk(self, "256k")
        self.train_until_given_up(disk, 6)
        self.assertEqual(names_in(disk.folder + "/run"), ["metrics.jsonl", "starts.json"])

    def test_second_save_leaves_the_first_whole(self):
        disk = SmallDisk(self, "512k")
        self.train_until_given_up(disk, 6)
        self.assertEqual(names_in(disk.folder + "/run"), ["metrics.jsonl", "starts.json", "step_00000003.h5",
                                                               "step_00000003.h5.manifest"])
        self.ok("tf_inspect", f"{disk.folder}/run/step_00000003.h5")
        # With space again the run goes on from there.
        os.mkdir(self.path("moved"))
        for name in names_in(disk.folder + "/run"):
            shutil.copy(f"{disk.folder}/run/{name}", self.path("moved"))
        ended = self.ok("tf_train", "--config", "tiny.toml", "--set", "run.dir=moved", ranks=2)
        self.assertIn("goes on from moved/step_00000003.h5 (step 3)", ended.err)
        steps = [json.loads(line)["step"] for line in self.read("moved/metrics.jsonl").splitlines()]
        self.assertEqual(sorted(set(steps)), [1, 2, 3, 4, 5, 6])


if __name__ == "__main__":
    unittest.main()
