import org.codelibs.opensearch.runner.OpenSearchRunner;

/** One OpenSearch node: java OpenSearchNode FOLDER setting=value ... It stops when its standard input is closed. */
public class OpenSearchNode {
    public static void main(String[] args) throws Exception {
        OpenSearchRunner runner = new OpenSearchRunner();
        runner.onBuild((number, settings) -> {
            for (int i = 1; i < args.length; i++) {
                settings.put(args[i].split("=", 2)[0], args[i].split("=", 2)[1]);
            }
        });
        runner.build(OpenSearchRunner.newConfigs().basePath(args[0]).numOfNode(1).useLogger()
                .pluginTypes("org.opensearch.knn.plugin.KNNPlugin"));
        while (System.in.read() >= 0) {}
        System.exit(0);
    }
}
