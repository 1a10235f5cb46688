"""The page of a run, made by a thread of rank 0 while the ranks train."""

import threading

import lightning.pytorch as pl

from nemo_moviegen.live.page import Page


class ProgressPage(pl.Callback):
    """Makes progress.html every `progress.every_seconds`, and once more when the run ends, however it does.

    What goes wrong is said once, and training goes on.
    """

    def __init__(self, recipe):
        self.recipe = recipe
        self._thread = None

    def on_train_start(self, trainer, module):
        if not (trainer.is_global_zero and self.recipe.progress.every_seconds):
            return
        self.page, self.told = Page(self.recipe.output), False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_making, name="progress page", daemon=True)
        self._thread.start()

    def on_exception(self, trainer, module, exception):
        self._end()

    def teardown(self, trainer, module, stage):
        self._end()

    def _keep_making(self):
        while True:
            self._make()
            if self._over.wait(self.recipe.progress.every_seconds):
                return

    def _end(self):
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None
            self._make(ended=True)

    def _make(self, ended=False):
        try:
            self.page.write(ended=ended)
        except Exception as error:  # a page is never worth a run
            if not self.told:
                self.told = True
                print(f"{self.recipe.name}: no progress page: {type(error).__name__}: {error}", flush=True)
