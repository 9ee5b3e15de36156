"""What other people on the machine, and files made by them, must not decide: modes, paths, commands."""

import os
import shutil
import stat
import unittest

from support import JobTest, names_in


class Security(JobTest):
    """The jobs run with another umask than usual, and with text in the configuration that a shell would obey."""

    UMASK = 0o027
    RUN = "run $(touch obeyed); touch obeyed"

    @classmethod
    def setUpClass(cls):
        before = os.umask(cls.UMASK)
        cls.addClassCleanup(os.umask, before)
        super().setUpClass()
        cls.finish(cls.run_job("tf_train", "--config", "tiny.toml", "--set", f'run.dir="{cls.RUN}"',
                               "--set", 'run.name="`touch obeyed`"', "--set", "train.steps=3"))
        for name in ["step_00000003.h5", "step_00000003.h5.manifest"]:
            shutil.copy(cls.path(f"{cls.RUN}/{name}"), cls.path(name))

    def test_files_follow_the_umask(self):
        self.ok("tf_expand", "--checkpoint", "step_00000003.h5", "--output", "grown.h5", "--tokens", "ffn=48", "--threads", 1)
        self.ok("tf_eval", "--checkpoint", "step_00000003.h5", "--data", "data.h5", "--json", "eval.json", "--threads", 1)
        written = ["data.h5", "grown.h5", "grown.h5.manifest", "eval.json"]
        written += [f"{self.RUN}/{name}" for name in names_in(self.path(self.RUN))]
        self.assertGreaterEqual(len(written), 7, written)  # two checkpoint files and metrics.jsonl
        for name in written:
            mode = stat.S_IMODE(os.stat(self.path(name)).st_mode)
            self.assertEqual(mode, 0o666 & ~self.UMASK, f"{name}: {mode:o}")
        self.assertEqual(stat.S_IMODE(os.stat(self.path(self.RUN)).st_mode), 0o777 & ~self.UMASK)

    def test_no_shell_reads_the_configuration(self):
        self.assertNotIn("obeyed", names_in(self.folder))

    def test_paths_in_a_checkpoint_lead_nowhere(self):
        """The stored configuration names a dataset and a folder. In a place without them nobody misses or makes them."""
        os.makedirs(self.path("elsewhere"))
        for name in ["step_00000003.h5", "step_00000003.h5.manifest", "data.h5"]:
            shutil.copy(self.path(name), self.path(f"elsewhere/{'other.h5' if name == 'data.h5' else name}"))
        trap = self.path("elsewhere")
        before = names_in(trap)
        self.assertIn("data.h5", self.ok("tf_inspect", "--config", "step_00000003.h5").out)
        for job in [("tf_inspect", "step_00000003.h5"),
                    ("tf_generate", "--checkpoint", "step_00000003.h5", "--prompt", "In", "--tokens", 2, "--threads", 1),
                    ("tf_eval", "--checkpoint", "step_00000003.h5", "--data", "other.h5", "--threads", 1)]:
            ended = self.run_in(trap, *job)
            self.assertEqual(ended.code, 0, ended)
        self.assertEqual(names_in(trap), before)

    @classmethod
    def run_in(cls, folder, *job):
        back, cls.folder = cls.folder, folder
        try:
            return cls.run_job(*job)
        finally:
            cls.folder = back


if __name__ == "__main__":
    unittest.main()
