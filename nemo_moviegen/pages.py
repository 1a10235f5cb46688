"""HTML pages from the templates of the package: values are escaped, and one that is missing is an error."""


def render(template, **values) -> str:
    """The HTML of a file of `templates/` with `values` by name."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("nemo_moviegen"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)
